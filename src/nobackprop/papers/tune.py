"""Searches settings for a grid's cells by validation accuracy, with the same budget for each (search.yaml).

    python scripts/tune.py compare --only net=mnist_mlp rule=bp,lra_e
    python scripts/tune.py lra_e --only dataset=mnist hidden_layers=3 --jobs 2

The cells are those of papers/<grid>/grid.yaml that take a file of tuned settings, `+tuned@_global_=...`. The search
makes that file once a cell has all its trials. The trials of a cell are the points of a scrambled Halton sequence. More
trials go on where fewer ended. With `rungs` the search is a successive halving: all trials train for the mini-batches
of the first rung, the best of them train anew for those of the second, and so on, and the finalists do it with several
seeds. `keep: 3` lets the best third of a rung go on. In cells that are searched at equal compute, a trial has as many
forward passes as every other one of its rung, and so fewer mini-batches where a step costs more. Each trial is an
ordinary run, and recorded trials are not run again. The best validation accuracy decides, never a test figure. A trial
that diverges counts as 0. The command ends with a table. It says where a winner lies near an end of its range, and how
the order of trials after one rung agrees with that after the next one. With other rungs, seeds or another `keep` the
command only looks: it writes no settings, and the table says how those in use do among the trials of the last rung. The
exit status is 1 if all trials of a cell diverged or the command has a mistake.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log, nan
from pathlib import Path
from statistics import mean
from textwrap import wrap
from typing import Annotated, Any, Literal

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)
from rich.console import Console
from rich.table import Table
from scipy.stats import qmc, spearmanr

from nobackprop.composing import check, home, load
from nobackprop.mistakes import Mistake, answering, close, faults
from nobackprop.papers.grid import TUNED, Cell, cells, composed, fits, select
from nobackprop.places import PAPERS
from nobackprop.records import files, machine
from nobackprop.records.identity import digest
from nobackprop.records.record import Record
from nobackprop.sweeps.jobs import Job
from nobackprop.sweeps.local import Basic, Processes
from nobackprop.training.work import passes

Setting = bool | int | float | str
Point = dict[str, Setting]
BUDGET = ["rungs", "trials", "runs"]  # columns of the table; other budgets of a cell have lines of their own
EDGE = 0.05  # of a range, on its logarithmic scale: a winner that near to an end may have a better one beyond it


class _Dimension(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    when: dict[str, list[str]] = {}  # searched only in cells with one of these choices on each of these axes


class Range(_Dimension):
    """Numbers between two positive ends, log-uniform, to three digits."""

    low: PositiveFloat
    high: PositiveFloat

    def at(self, u: float) -> Setting:
        return float(f"{self.low * (self.high / self.low) ** u:.3g}")

    def edge(self, value: Any) -> str:
        """Which end of the range a value is near: low, high or neither, an empty text."""
        u = log(value / self.low) / log(self.high / self.low)
        return "low" if u < EDGE else "high" if u > 1 - EDGE else ""

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


class Choice(_Dimension):
    """One of several values, all equally often."""

    values: Annotated[list[Setting], Field(min_length=2)]

    def at(self, u: float) -> Setting:
        return self.values[int(u * len(self.values))]

    def __str__(self) -> str:
        return " or ".join(map(str, self.values))


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _kind(value: Any) -> str:
    return "choice" if isinstance(value, Choice) or (isinstance(value, dict) and "values" in value) else "range"


Dimension = Annotated[Annotated[Range, Tag("range")] | Annotated[Choice, Tag("choice")], Discriminator(_kind)]
Dimensions = Annotated[list[Dimension], Field(min_length=1), BeforeValidator(_listed)]


class EqualCompute(BaseModel):
    """The cells whose trials cost the same in a rung: `step` forward passes for each mini-batch that the rung names."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    step: PositiveFloat
    where: dict[str, list[str]]


class Search(BaseModel):
    """papers/<grid>/search.yaml. A trial has either so many `epochs`, or the mini-batches of the rung that it is in."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    trials: PositiveInt  # of each cell
    epochs: PositiveInt | None = None
    rungs: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    keep: PositiveInt = 3  # one of so many trials of a rung goes on
    seed: NonNegativeInt  # of the trials; it draws the points, too
    seeds: PositiveInt = 1  # of the last rung's trials: so many from `seed` on
    draw: Literal["alike", "for each rule"]  # whether all cells try the same values of a key that they share
    compute: PositiveInt | None = None  # of a run at equal compute, in forward passes of a mini-batch
    where: dict[str, list[str]] = {}  # the part of the grid that is searched; cells that share settings are one
    equal_compute: EqualCompute | None = None  # another part
    space: Annotated[dict[str, Dimensions], Field(min_length=1)]  # of several, a cell searches the last that fits it

    @model_validator(mode="after")
    def _fits(self) -> "Search":
        if (self.epochs is None) == (self.rungs is None):
            raise Mistake("give epochs or rungs")
        if self.rungs and self.rungs != sorted(set(self.rungs)):
            raise Mistake("rungs: each has more mini-batches than the one before")
        if self.equal_compute and not (self.rungs and self.compute):
            raise Mistake("equal_compute: give rungs and compute, too")
        return self

    @property
    def count(self) -> int:
        """How many rungs there are; without rungs it is one."""
        return len(self.rungs) if self.rungs else 1

    def forward_passes(self, cell: Cell) -> float | None:
        """What a mini-batch of a rung stands for in this cell, in forward passes; None where it stands for itself."""
        equal = self.equal_compute
        return equal.step if equal and fits(cell.labels, equal.where) else None

    def length(self, cell: Cell, rung: int, config: DictConfig) -> dict[str, int | None]:
        """The settings that make a trial's length. `config` has its other ones, on which the cost of a step depends."""
        if self.rungs is None:
            return {"max_epochs": self.epochs}
        steps, each = self.rungs[rung], self.forward_passes(cell)
        return {"max_epochs": 1000, "max_steps": steps if each is None else _steps(steps * each, _cost(config))}

    def seeds_of(self, rung: int) -> list[int]:
        return list(range(self.seed, self.seed + (self.seeds if rung == self.count - 1 else 1)))

    @classmethod
    def read(cls, name: str) -> "Search":
        """The search of that name. Raises Mistake, which says what is wrong, if it does not exist or is invalid."""
        names = sorted(path.parent.name for path in PAPERS.glob("*/search.yaml"))
        if name not in names:
            raise Mistake(f"no search {name!r}: choose one of {', '.join(names)}{close(name, names)}")
        path = PAPERS / name / "search.yaml"
        search = cls.of(load(path), str(path))
        known = {choice for cell in cells(name) for choice in cell.labels.items()}
        equal = [("equal_compute", search.equal_compute.where)] if search.equal_compute else []
        whens = [(key, each.when) for key, dimensions in search.space.items() for each in dimensions]
        for key, where in [("where", search.where), *equal, *whens]:
            for axis, choices in where.items():
                if unknown := [choice for choice in choices if (axis, choice) not in known]:
                    raise Mistake(f"{path}: {key}: no cell of the grid has {axis}={','.join(unknown)}")
        return search

    @classmethod
    def of(cls, content: Any, source: str) -> "Search":
        """A search from a mapping. `source` is its name in messages."""
        try:
            search = cls.model_validate(content)
        except ValidationError as e:
            told = "; ".join(faults(e, unnamed=(0, "range", "choice")))  # of one dimension the file has neither
            advice = " (write low and high, both above 0, or values, two or more)" * ("space." in told)
            raise Mistake(f"{source}: {told}{advice}") from None
        for key, dimensions in search.space.items():
            for each in dimensions:
                if isinstance(each, Range) and each.low >= each.high:
                    raise Mistake(f"{source}: {key} goes from {each.low:g} to {each.high:g}: low must be less")
        return search

    def cells(self, name: str) -> list[Cell]:
        """The cells of a grid that this searches, one for each file of tuned settings."""
        tuned = [cell for cell in cells(name) if cell.tuned is not None]
        return [cell for cell in tuned if fits(cell.labels, self.where) or self.forward_passes(cell)]

    def within(self, cell: Cell) -> dict[str, Range | Choice]:
        """The part of the space that a cell searches: of each key the last dimension that fits."""
        return {
            key: each for key, dimensions in self.space.items() for each in dimensions if fits(cell.labels, each.when)
        }

    def points(self, cell: Cell) -> list[Point]:
        """The settings of each trial of a cell.

        With `draw: alike`, a key has the same values in every cell that searches it. Otherwise they are drawn for the
        cell's rule.
        """
        within = self.within(cell)
        keys, rng = list(self.space), self.seed
        if self.draw == "for each rule":
            keys, rng = list(within), int(digest({"seed": self.seed, "rule": cell.labels.get("rule")}), 16)
        sequence = qmc.Halton(len(keys), rng=rng).random(self.trials)
        column = {key: i for i, key in enumerate(keys)}
        return [{key: d.at(row[column[key]]) for key, d in within.items()} for row in sequence]

    def fixed(self, cell: Cell, further: Sequence[str]) -> list[str]:
        """The overrides that all trials of a cell have: all that the cell sets except its tuned settings."""
        own = [text for text in cell.overrides if not text.startswith(TUNED)]
        return [*own, *further, "logger=none", "diagnostics=none", "workers=1"]

    def overrides(self, cell: Cell, point: Point, further: Sequence[str], rung: int = 0) -> list[str]:
        """The overrides of a cell's trial at a point, except its length."""
        seeds = ",".join(map(str, self.seeds_of(rung)))
        settings = (f"{key}={value}" for key, value in point.items())
        return [*self.fixed(cell, further), f"seeds=[{seeds}]", *settings]


def _cost(config: DictConfig) -> float:
    """What a step of a run costs, in forward passes of a mini-batch."""
    run = Job("", config).run
    return passes(run.rule, run.net, run.loss, run.settings.batch_size)


def _steps(compute: float, cost: float) -> int:
    """The mini-batches that cost so many forward passes in all."""
    return max(1, round(compute / cost))


@dataclass(frozen=True)
class Trial:
    """The records of a point in a rung, one for each seed."""

    point: Point
    records: Sequence[Record]

    @property
    def validation(self) -> float:
        """The mean over seeds; 0 for a seed that diverged."""
        return mean(record.validation for record in self.records)


@dataclass(frozen=True)
class Searched:
    """The result of the search of one cell: its trials in each rung."""

    cell: Cell
    rungs: Sequence[Sequence[Trial]]

    @property
    def best(self) -> Trial:
        """The trial with the best validation accuracy in the last rung, and of equals the first."""
        return max(self.rungs[-1], key=lambda trial: trial.validation)

    def edges(self, within: Mapping[str, Range | Choice]) -> dict[str, str]:
        """The keys of which the best value is near an end of its range, and which end that is."""
        ranges = {key: each for key, each in within.items() if isinstance(each, Range)}
        return {key: end for key, each in ranges.items() if (end := each.edge(self.best.point[key]))}

    def correlations(self) -> list[tuple[float, int]]:
        """For each rung but the first: Spearman's correlation of the accuracies there with those one rung before.

        It is of the trials that went on, whose number is given, too. It is NaN where there are fewer than three.
        """
        found = []
        for before, after in pairwise(self.rungs):
            first = {str(trial.point): trial.validation for trial in before}
            pairs = [(first[str(trial.point)], trial.validation) for trial in after]
            several = len(pairs) > 2 and all(len(set(side)) > 1 for side in zip(*pairs, strict=True))
            result: Any = spearmanr(pairs) if several else None
            found.append((float(result.statistic) if several else nan, len(pairs)))
        return found


def command_of(cell: Cell, name: str, search: Search, further: Sequence[str]) -> str:
    """The command that searches this cell alone."""
    length = "" if search.epochs is None else f" --epochs {search.epochs}"
    command = f"python scripts/tune.py {name} --trials {search.trials}{length} --only {cell}"
    return command + (f" --set {' '.join(further)}" if further else "")


def check_replaces(cell: Cell, name: str, search: Search, further: Sequence[str]) -> None:
    """Raises Mistake where a cell's settings were found by another command, since this search would replace them."""
    if cell.tuned is None or not cell.tuned.exists():
        return
    text = cell.tuned.read_text()
    if f"#   {command_of(cell, name, search, further)}\n" not in text:
        (before,) = [line[4:] for line in text.splitlines() if line.startswith("#   ")] or ["another search"]
        raise Mistake(f"{cell.tuned} was found by `{before}`: delete it to search it in another way")


def rungs_of(search: Search, cell: Cell) -> tuple[list[str], str]:
    """The length of a trial of each rung, and its unit."""
    each = search.forward_passes(cell)
    if each is None:
        return [str(steps) for steps in search.rungs or []], "mini-batches"
    return [f"{steps * each:g}" for steps in search.rungs or []], "forward passes"


def budget(search: Search, cell: Cell) -> str:
    """What a cell's trials cost, in words."""
    if search.rungs is None:
        return f"{search.trials} trials: seed {search.seed}, {search.epochs} epochs"
    lengths, unit = rungs_of(search, cell)
    return (
        f"{search.trials} trials: {', '.join(lengths)} {unit}, one in {search.keep} goes on, "
        f"the last ones with {search.seeds} seeds from {search.seed} on"
    )


def write(found: Searched, name: str, search: Search, further: Sequence[str], path: Path) -> None:
    """Writes the settings that were found as a file of conf/tuned, under a header that says how they were found.

    For a run at equal compute, a file has the number of mini-batches whose steps cost that much by `work.passes`. It is
    the same file for a cell that is searched at equal compute. Another cell of a search with `compute` gets a second
    file, in a folder `compute` beside it, with the same settings.
    """
    within = search.within(found.cell)
    told = (
        f"The best by validation accuracy, {found.best.validation:.2%}, of {budget(search, found.cell)}. "
        f"Searched: {'; '.join(f'{key} {dimension}' for key, dimension in within.items())}."
    )
    if edges := found.edges(within):
        told += f" Near an end of its range: {', '.join(f'{key} ({end})' for key, end in edges.items())}."
    settings = OmegaConf.create()
    for key, value in found.best.point.items():
        OmegaConf.update(settings, key, value)
    header = [
        "# @package _global_",
        *(f"# {line}" for line in wrap(told, 116)),
        f"#   {command_of(found.cell, name, search, further)}",
    ]
    at_compute = settings.copy()
    if search.compute:
        cost = _cost(composed(search.overrides(found.cell, found.best.point, further)))
        at_compute.max_steps = _steps(search.compute, cost)
        told = f"{search.compute} forward passes in all. A step costs {cost:.2f} of them."
        if search.forward_passes(found.cell) is None:
            first = [header[0], f"# As {path.stem}, for {told}"]
            _write(path.parent / "compute" / path.name, first, at_compute)
        else:
            header, settings = [*header, f"# A run has {told}"], at_compute
    _write(path, header, settings)


def _write(path: Path, header: Sequence[str], settings: DictConfig) -> None:
    files.write_atomically(path, "\n".join([*header, OmegaConf.to_yaml(settings)]).encode())


def tune(
    search: Search, chosen: Sequence[Cell], further: Sequence[str], jobs: int, console: Console
) -> Iterator[Searched]:
    """Runs every trial that has no record yet, so many at a time. Gives each cell when all its trials have ended.

    Raises Mistake for a space that does not fit a cell, before any trial, and for a trial that fails.
    """
    first = {str(cell): composed(search.overrides(cell, search.points(cell)[0], further)) for cell in chosen}
    for cell in chosen:
        _ = Job(str(cell), first[str(cell)]).run
    for i, cell in enumerate(chosen):
        points, rungs = search.points(cell), []
        for rung in range(search.count):
            console.print(f"{cell} ({i + 1} of {len(chosen)}), rung {rung + 1}: {len(points)} trials", highlight=False)
            ready = {k: _job(search, cell, point, rung, first[str(cell)]) for k, point in enumerate(points)}
            ended: dict[int, Trial] = {}
            launcher = Basic() if jobs == 1 else Processes(jobs)
            for k, outcome in launcher.run(ready, lambda k, text: None, Console(quiet=True), wait_for_others=True):
                if outcome.state == "failed":
                    raise Mistake(f"{ready[k].label}: {outcome.details}")
                ended[k] = Trial(points[k], outcome.records)
            rungs.append([ended[k] for k in sorted(ended)])
            best_first = sorted(rungs[-1], key=lambda trial: -trial.validation)
            points = [trial.point for trial in best_first[: ceil(len(best_first) / search.keep)]]
        yield Searched(cell, rungs)


def _job(search: Search, cell: Cell, point: Point, rung: int, first: DictConfig) -> Job:
    """A trial's job. Hydra composes the config of a cell once; here, values of it are replaced."""
    config = deepcopy(first)
    for key, value in {"seeds": search.seeds_of(rung), **point}.items():
        OmegaConf.update(config, key, value)
    for key, value in search.length(cell, rung, config).items():
        OmegaConf.update(config, key, value)
    return Job(" ".join([str(cell), *(f"{key}={value}" for key, value in point.items())]), config)


def in_use(found: Searched) -> str:
    """The place of the cell's settings among the trials of the last rung, and their accuracy there.

    It is empty where they are not among them.
    """
    if found.cell.tuned is None or not found.cell.tuned.exists():
        return ""
    settings = OmegaConf.load(found.cell.tuned)
    in_order = sorted(found.rungs[-1], key=lambda trial: -trial.validation)
    for place, trial in enumerate(in_order, 1):
        if all(OmegaConf.select(settings, key) == value for key, value in trial.point.items()):
            return f"{place} of {len(in_order)}, {trial.validation:.2%}"
    return ""


def rows(search: Search, found: Sequence[Searched], look: bool = False) -> pd.DataFrame:
    """A line for each cell: its best validation accuracy, the settings that gave it, and how the trials went."""
    lines = []
    for each in found:
        every = [record for trials in each.rungs for trial in trials for record in trial.records]
        edges = each.edges(search.within(each.cell))
        lines.append(
            {
                **each.cell.labels,
                "validation": f"{each.best.validation:.2%}",
                "settings": " ".join(f"{key}={value}" for key, value in each.best.point.items()),
                "near an end": " ".join(f"{key}:{end}" for key, end in edges.items()),
                "rank correlations": " ".join(f"{rho:.2f} (n={n})" for rho, n in each.correlations()),
                **({"in use": in_use(each)} if look else {}),
                "rungs": " ".join(rungs_of(search, each.cell)[0]),
                "trials": len(each.rungs[0]),
                "runs": len(every),
                "mini-batches": sum(record.steps for record in every),
                "diverged": sum(record.diverged_epoch is not None for record in every),
                "seconds": round(sum(record.seconds for record in every)),
            }
        )
    return pd.DataFrame(lines)


def lines_of(path: Path, cell: Cell) -> pd.DataFrame:
    """The lines that a file of `--table` has already. Raises Mistake where they are not of such cells."""
    if not path.exists():
        return pd.DataFrame()
    try:
        lines = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except ValueError as e:
        raise Mistake(f"--table {path}: it is no table ({e}); give a new file") from None
    if missing := {*cell.labels, *BUDGET} - {*lines.columns}:
        raise Mistake(f"--table {path}: it has no column {' and '.join(sorted(missing))}; give a table of this search")
    return lines


def joined(lines: pd.DataFrame, new: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """Both tables; a line of the new one replaces that of the same cell and budget."""
    return pd.concat([lines, new.astype(str)]).drop_duplicates([*cell.labels, *BUDGET], keep="last")


def table(found: Sequence[Searched], frame: pd.DataFrame) -> Table:
    """The lines of `rows` for the screen."""
    left_out = {*found[0].cell.labels, "rungs", "trials", "mini-batches"}
    shown = [column for column in frame if column not in left_out]
    result = Table("cell", *shown)
    for each, line in zip(found, frame[shown].itertuples(index=False), strict=True):
        result.add_row(str(each.cell), *map(str, line))
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
    looking = parser.add_argument_group("to look at how trials go on")
    looking.add_argument("--keep", type=int, help="one of so many trials goes on; 1: all do")
    looking.add_argument("--rungs", type=int, nargs="+", help="the mini-batches of each rung, instead of the search's")
    looking.add_argument("--seeds", type=int, help="of the trials of the last rung, instead of the search's")
    parser.add_argument(
        "--table", type=Path, metavar="FILE.csv", help="where to write the table, too; lines of other cells stay"
    )
    parser.add_argument("--jobs", type=int, choices=range(1, cores + 1), default=cores, help="trials at a time")
    parser.add_argument("--runs", help="the folder of the trials (default: runs/tune/SEARCH)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides for every trial"
    )
    options = parser.parse_args()
    console = Console()
    with answering(parser.prog):
        search = Search.read(options.search)
        keys = ("trials", "epochs", "keep", "rungs", "seeds")
        given = {key: value for key in keys if (value := getattr(options, key)) is not None}
        look = not given.keys() <= {"trials", "epochs"}
        search = Search.of(search.model_dump() | given, "the command")
        chosen = select(search.cells(options.search), options.only)
        for cell in () if look else chosen:
            check_replaces(cell, options.search, search, options.set)
        further = [home(text) for text in (*options.set, f"paths.runs={options.runs or f'runs/tune/{options.search}'}")]
        check(further)
        if options.table:
            lines_of(options.table, chosen[0])
        found = []
        for each in tune(search, chosen, further, options.jobs, console):
            found.append(each)
            console.print(f"{each.cell}: {each.best.validation:.2%} {each.best.point}", highlight=False, soft_wrap=True)
            if each.best.validation and each.cell.tuned is not None and not look:
                write(each, options.search, search, options.set, each.cell.tuned)
            if options.table:  # which another search may have written to since
                lines = joined(lines_of(options.table, each.cell), rows(search, [each], look), each.cell)
                files.write_atomically(options.table, lines.to_csv(index=False).encode())
    console.print(table(found, rows(search, found, look)))
    parser.exit(0 if all(each.best.validation for each in found) else 1)
