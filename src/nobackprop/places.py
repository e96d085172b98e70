"""Where this program keeps what it reads, in a checkout and in a wheel."""

from pathlib import Path

_here = Path(__file__).parent


# A wheel carries the configs inside the package, a checkout beside src/.
CONF = _here / "conf" if (_here / "conf").is_dir() else _here.parents[1] / "conf"
