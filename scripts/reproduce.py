"""Runs a paper's experiments: every cell of its grid, conf/grid/<paper>.yaml, or a part of it.

    python scripts/reproduce.py lra_e --seeds 3 --epochs 10
    python scripts/reproduce.py mdfa --only net=mlp_mnist classes=2,3 --dry-run
    python scripts/reproduce.py mdfa --only net=mlp_cifar10 --set dataset=cifar10_jpeg --jobs 4

What is recorded already is not run again; a cell that fails does not end the others; cells whose settings are still to
be searched (scripts/tune.py) are named and passed over. `--set` takes further overrides for every cell, as the command
`nobackprop` takes them; `--set launcher=slurm launcher.partition=...` submits the cells to a cluster. Ends with a table
of all cells; exit status 1 if any failed.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from nobackprop.cli import CONF

TUNED = "+tuned@_global_="  # after an experiment, whose settings it replaces; plain tuned=... comes before it


@dataclass(frozen=True)
class Cell:
    """One experiment of a grid: its choice on each axis, and what they mean as overrides."""

    labels: Mapping[str, str]
    overrides: Sequence[str]

    def __str__(self) -> str:
        return " ".join(f"{axis}={choice}" for axis, choice in self.labels.items())

    @property
    def tuned(self) -> Path | None:
        """The file of tuned settings that this cell takes, if it takes one."""
        names = [text.removeprefix(TUNED) for text in self.overrides if text.startswith(TUNED)]
        return CONF / "tuned" / f"{names[-1]}.yaml" if names else None

    def config(self, further: Sequence[str] = ()) -> DictConfig:
        """The composed config; of several overrides of one key the last one counts.

        Raises FileNotFoundError where it takes tuned settings that were not searched yet.
        """
        if self.tuned is not None and not self.tuned.exists():
            raise FileNotFoundError(f"{self.tuned} is not there yet: scripts/tune.py makes it")
        by_key = {text.split("=", 1)[0]: text for text in (*self.overrides, *further)}
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", list(by_key.values()))


def cells(paper: str) -> Iterator[Cell]:
    """Every cell of a paper's grid; `{axis}` in an override is the cell's choice on that axis.

    Raises ValueError, with the papers there are, for another one.
    """
    papers = sorted(path.stem for path in (CONF / "grid").glob("*.yaml"))
    if paper not in papers:
        raise ValueError(f"no grid for paper {paper!r}: choose one of {', '.join(papers)}")
    grids: Any = OmegaConf.to_container(OmegaConf.load(CONF / "grid" / f"{paper}.yaml"))
    for grid in grids:
        for choices in product(*(axis.items() for axis in grid.values())):
            labels = {axis: str(label) for axis, (label, _) in zip(grid, choices, strict=True)}
            yield Cell(labels, [text.format(**labels) for _, overrides in choices for text in overrides])


def select(every: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells with one of the choices given for each axis, as in `classes=2,3`. Raises ValueError where none fits."""
    wanted = {axis: choices.split(",") for axis, _, choices in (text.partition("=") for text in only)}
    known: dict[str, set[str]] = {}
    for cell in every:
        for axis, label in cell.labels.items():
            known.setdefault(axis, set()).add(label)
    for axis, choices in wanted.items():
        if axis not in known:
            raise ValueError(f"--only {axis}=...: no such axis; choose from {', '.join(known)}")
        if unknown := set(choices) - known[axis]:
            raise ValueError(f"--only {axis}={','.join(sorted(unknown))}: choose from {', '.join(sorted(known[axis]))}")
    fitting = [c for c in every if all(c.labels.get(axis) in choices for axis, choices in wanted.items())]
    if not fitting:
        raise ValueError(f"no cell fits --only {' '.join(only)}: these choices do not occur together")
    return fitting


def run(chosen: Sequence[Cell], further: Sequence[str], console: Console, dry: bool) -> bool:
    """Runs cells as a sweep, with the launcher that `further` names; whether all went well.

    Passes over those that take tuned settings which were not searched yet; raises FileNotFoundError if that is all.
    """
    from nobackprop import sweeps  # torch takes seconds to import

    ready = [cell for cell in chosen if cell.tuned is None or cell.tuned.exists()] or chosen
    if left := [str(cell) for cell in chosen if cell not in ready]:
        text = f"passed over until scripts/tune.py has searched their settings, {len(left)} cells: {'; '.join(left)}"
        console.print(text, highlight=False, soft_wrap=True)
    jobs = [sweeps.Job(str(cell), cell.config(further)) for cell in ready]
    outcomes = sweeps.run(jobs, sweeps.launcher_of(jobs[0].config), console, dry)
    return all(outcome.state != "failed" for outcome in outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", help="a file of conf/grid, without .yaml")
    parser.add_argument("--only", nargs="+", default=[], metavar="AXIS=CHOICE,...", help="a part of the grid")
    parser.add_argument("--seeds", help="how many, or a list such as [0,4,7]")
    parser.add_argument("--epochs", type=int, help="instead of the paper's")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for every cell")
    parser.add_argument("--jobs", type=int, help="cells at a time, each in a process of its own")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and about how long it would take")
    options = parser.parse_args()
    further = [*options.set]
    further += [] if options.seeds is None else [f"seeds={options.seeds}"]
    further += [] if options.epochs is None else [f"max_epochs={options.epochs}"]
    further += [] if options.jobs is None else ["launcher=joblib", f"launcher.workers={options.jobs}"]
    try:
        chosen = select(list(cells(options.paper)), options.only)
        well = run(chosen, further, Console(), options.dry_run)
    except (ValueError, FileNotFoundError, HydraException) as error:
        parser.exit(2, f"{Path(__file__).name}: {error}\n")
    parser.exit(0 if well else 1)


if __name__ == "__main__":
    main()
