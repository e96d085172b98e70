"""The command `nobackprop`: a Hydra application. It imports little, so that --help and mistyped keys answer at once."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

_here = Path(__file__).parent
# A wheel carries the configs inside the package, a checkout beside src/.
CONF = _here / "conf" if (_here / "conf").is_dir() else _here.parents[1] / "conf"


def run(cfg: DictConfig) -> None:
    """Trains one config and prints its summary; a user's mistake ends in one sentence, without a traceback."""
    from rich.console import Console

    from nobackprop.train import summary, train

    console = Console()
    try:
        recorded = train(cfg, console)
    except (ValueError, FileNotFoundError) as e:
        if "HYDRA_FULL_ERROR" in os.environ or HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        sys.exit(f"nobackprop: {e}")
    console.print(summary(recorded))
    folder = Path(cfg.paths.runs) / f"{recorded[0].name}-{recorded[0].signature}"
    console.print(f"records and weights: {folder}", highlight=False, soft_wrap=True)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(cfg: DictConfig) -> None:
    run(cfg)


if __name__ == "__main__":
    main()
