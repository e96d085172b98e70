"""Where this program keeps what it reads: in a checkout beside `src/`, in a wheel inside the package."""

from pathlib import Path

PACKAGE = Path(__file__).parent
_checkout = PACKAGE.parents[1]
_in_wheel = (PACKAGE / "conf").is_dir()
CONF = PACKAGE / "conf" if _in_wheel else _checkout / "conf"  # what Hydra composes
PAPERS = PACKAGE / "paper_folders" if _in_wheel else _checkout / "papers"  # a folder each
RESULTS = Path("results") if _in_wheel else _checkout / "results"  # records, and what is made from them
