"""Searches settings for a grid's cells by validation accuracy, with the same budget for each (search.yaml).

    python scripts/tune.py lra_e --only dataset=mnist hidden_layers=3
    python scripts/tune.py compare --only net=mlp rule=bp,lra_e --jobs 2

The cells are those of papers/<grid>/grid.yaml that take a file of tuned settings, `+tuned@_global_=...`. The search
makes that file once a cell has all its trials. The trials are the points of a scrambled Halton sequence. So more trials
go on where fewer ended, and every cell tries the same rates. Each trial is an ordinary run on one seed, and recorded
trials are not run again. The best validation accuracy decides, never a test figure. A trial that diverges counts as 0.
The command ends with a table. The exit status is 1 if all trials of a cell diverged or the command has a mistake.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import qmc

from nobackprop.composing import check, home, load
from nobackprop.mistakes import Mistake, answering, close
from nobackprop.papers.grid import TUNED, Cell, cells, composed, select
from nobackprop.places import PAPERS
from nobackprop.records import files, machine
from nobackprop.records.record import Record
from nobackprop.sweeps.jobs import Job
from nobackprop.sweeps.local import Processes

Setting = bool | int | float | str
Point = dict[str, Setting]


class _Dimension(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    when: dict[str, list[str]] = {}  # searched only in cells with one of these choices on each of these axes


class Range(_Dimension):
    """Numbers between two positive ends, log-uniform, to three digits."""

    low: PositiveFloat
    high: PositiveFloat

    def at(self, u: float) -> Setting:
        return float(f"{self.low * (self.high / self.low) ** u:.3g}")

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


class Choice(_Dimension):
    """One of several values, all equally often."""

    values: Annotated[list[Setting], Field(min_length=2)]

    def at(self, u: float) -> Setting:
        return self.values[int(u * len(self.values))]

    def __str__(self) -> str:
        return " or ".join(map(str, self.values))


class Search(BaseModel):
    """papers/<grid>/search.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    trials: PositiveInt
    epochs: PositiveInt
    seed: NonNegativeInt  # of the trials; it draws the points, too
    space: Annotated[dict[str, Range | Choice], Field(min_length=1)]

    @classmethod
    def read(cls, name: str) -> "Search":
        """The search of that name. Raises Mistake, which says what is wrong, if it does not exist or is invalid."""
        names = sorted(path.parent.name for path in PAPERS.glob("*/search.yaml"))
        if name not in names:
            raise Mistake(f"no search {name!r}: choose one of {', '.join(names)}{close(name, names)}")
        path = PAPERS / name / "search.yaml"
        search = cls.of(load(path), str(path))
        known = {choice for cell in cells(name) for choice in cell.labels.items()}
        for key, dimension in search.space.items():
            for axis, choices in dimension.when.items():
                if unknown := [choice for choice in choices if (axis, choice) not in known]:
                    raise Mistake(f"{path}: {key}: no cell of the grid has {axis}={','.join(unknown)}")
        return search

    @classmethod
    def of(cls, content: Any, source: str) -> "Search":
        """A search from a mapping. `source` is its name in messages."""
        try:
            search = cls.model_validate(content)
        except ValidationError as e:
            told = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors())
            raise Mistake(f"{source}: {told} (write low and high, both above 0, or values, two or more)") from None
        for key, dimension in search.space.items():
            if isinstance(dimension, Range) and dimension.low >= dimension.high:
                raise Mistake(f"{source}: {key} goes from {dimension.low:g} to {dimension.high:g}: low must be less")
        return search

    def within(self, cell: Cell) -> dict[str, Range | Choice]:
        """The part of the space that a cell searches."""
        return {
            key: dimension
            for key, dimension in self.space.items()
            if all(cell.labels.get(axis) in choices for axis, choices in dimension.when.items())
        }

    def points(self, cell: Cell) -> list[Point]:
        """The settings of each trial of a cell. A key has the same values in every cell that searches it."""
        sequence = qmc.Halton(len(self.space), rng=self.seed).random(self.trials)
        column = {key: i for i, key in enumerate(self.space)}
        within = self.within(cell)
        return [{key: d.at(row[column[key]]) for key, d in within.items()} for row in sequence]

    def overrides(self, cell: Cell, point: Point, further: Sequence[str]) -> list[str]:
        """The overrides of a cell's trial at a point: all that the cell sets except its tuned settings."""
        own = [text for text in cell.overrides if not text.startswith(TUNED)]
        fixed = [f"seeds=[{self.seed}]", f"max_epochs={self.epochs}", "logger=none"]
        return [*own, *further, *fixed, *(f"{key}={value}" for key, value in point.items())]


@dataclass(frozen=True)
class Searched:
    """The result of the search of one cell: its trials, each a point and its record."""

    cell: Cell
    trials: Sequence[tuple[Point, Record]]

    @property
    def best(self) -> tuple[Point, Record]:
        """The trial with the best validation accuracy, and of equals the first."""
        return max(self.trials, key=lambda trial: trial[1].validation)

    @property
    def accuracy(self) -> float:
        return self.best[1].validation


def command_of(cell: Cell, name: str, search: Search, further: Sequence[str]) -> str:
    """The command that searches this cell alone."""
    command = f"python scripts/tune.py {name} --trials {search.trials} --epochs {search.epochs} --only {cell}"
    return command + (f" --set {' '.join(further)}" if further else "")


def check_replaces(cell: Cell, name: str, search: Search, further: Sequence[str]) -> None:
    """Raises Mistake where a cell's settings were found by another command, since this search would replace them."""
    if cell.tuned is None or not cell.tuned.exists():
        return
    text = cell.tuned.read_text()
    if f"#   {command_of(cell, name, search, further)}\n" not in text:
        (before,) = [line[4:] for line in text.splitlines() if line.startswith("#   ")] or ["another search"]
        raise Mistake(f"{cell.tuned} was found by `{before}`: delete it to search it in another way")


def write(found: Searched, name: str, search: Search, further: Sequence[str], path: Path) -> None:
    """Writes the settings that were found as a file of conf/tuned, under a header that says how they were found."""
    within = search.within(found.cell)
    told = (
        f"The best by validation accuracy, {found.accuracy:.2%}, of {search.trials} trials: seed {search.seed}, "
        f"{search.epochs} epochs. Searched: {'; '.join(f'{key} {dimension}' for key, dimension in within.items())}."
    )
    settings = OmegaConf.create()
    for key, value in found.best[0].items():
        OmegaConf.update(settings, key, value)
    header = [
        "# @package _global_",
        *(f"# {line}" for line in wrap(told, 116)),
        f"#   {command_of(found.cell, name, search, further)}",
    ]
    files.write_atomically(path, "\n".join([*header, OmegaConf.to_yaml(settings)]).encode())


def tune(
    name: str, search: Search, chosen: Sequence[Cell], further: Sequence[str], jobs: int, console: Console
) -> Iterator[Searched]:
    """Runs every trial that has no record yet, so many at a time. Gives each cell when all its trials have ended.

    Raises Mistake for a space that does not fit a cell, before any trial, and for a trial that fails.
    """
    trials = [(cell, point) for cell in chosen for point in search.points(cell)]
    ready = {}
    for i, (cell, point) in enumerate(track(trials, f"{name}: composing", console=console)):
        label = " ".join([str(cell), *(f"{key}={value}" for key, value in point.items())])
        ready[i] = Job(label, composed(search.overrides(cell, point, further)))
        if i % search.trials == 0:
            _ = ready[i].run  # a space that does not fit is refused before any trial
    ended: dict[int, Record] = {}
    title = f"{name}: {len(chosen)} cells, {search.trials} trials each"
    outcomes = Processes(jobs).run(ready, lambda i, text: None, console, wait_for_others=True)
    for i, outcome in track(outcomes, title, len(trials), console=console):
        if outcome.state == "failed":
            raise Mistake(f"{ready[i].label}: {outcome.details}")
        (ended[i],) = outcome.records
        of_cell = range(first := i - i % search.trials, first + search.trials)
        if all(k in ended for k in of_cell):
            yield Searched(trials[i][0], [(trials[k][1], ended[k]) for k in of_cell])


def table(found: Sequence[Searched]) -> Table:
    """A table with each cell's best validation accuracy, the settings that gave it, and how the trials went."""
    result = Table("cell", "validation", "best settings", "trials", "diverged", "seconds")
    for each in found:
        settings = " ".join(f"{key}={value}" for key, value in each.best[0].items()) if each.accuracy else "-"
        every = [record for _, record in each.trials]
        diverged, seconds = sum(r.diverged_epoch is not None for r in every), sum(r.seconds for r in every)
        result.add_row(
            str(each.cell), f"{each.accuracy:.2%}", settings, *map(str, (len(every), diverged, round(seconds)))
        )
    return result


def main() -> None:
    cores = machine.cores()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("search", help="a folder of papers/ that has a search.yaml")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="AXIS=CHOICE,...", help="a part of the grid"
    )
    parser.add_argument("--trials", type=int, help="of each cell, instead of the search's")
    parser.add_argument("--epochs", type=int, help="of each trial, instead of the search's")
    parser.add_argument("--jobs", type=int, choices=range(1, cores + 1), default=cores, help="trials at a time")
    parser.add_argument("--runs", help="the folder of the trials (default: runs/tune/SEARCH)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides for every trial"
    )
    options = parser.parse_args()
    console = Console()
    with answering(parser.prog):
        search = Search.read(options.search)
        given = {key: value for key in ("trials", "epochs") if (value := getattr(options, key)) is not None}
        search = Search.of(search.model_dump() | given, "the command")
        tuned = [cell for cell in cells(options.search) if cell.tuned is not None]
        chosen = select(tuned, options.only)
        for cell in chosen:
            check_replaces(cell, options.search, search, options.set)
        further = [home(text) for text in (*options.set, f"paths.runs={options.runs or f'runs/tune/{options.search}'}")]
        check(further)
        found = []
        for each in tune(options.search, search, chosen, further, options.jobs, console):
            found.append(each)
            if each.accuracy and each.cell.tuned is not None:
                write(each, options.search, search, options.set, each.cell.tuned)
    console.print(table(found))
    parser.exit(0 if all(each.accuracy for each in found) else 1)
