"""The results of a paper's recorded runs: the cells of its tables, and the verdicts on its claims.

All of it comes from files: records (`results/records/*.jsonl`), the published figures, grid, tables and claims in
`papers/<paper>/`, the reasons why cells were not run (`results/not_run.yaml`), and the cost of a rule's step
(`results/benchmark.csv`). Nothing is trained.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal

import pandas as pd
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from nobackprop.composing import compose, load
from nobackprop.mistakes import Mistake, faults
from nobackprop.papers.claims import (
    Accuracies,
    Claims,
    Conditions,
    Labels,
    Place,
    Result,
    Score,
    Strict,
    interval,
    judge,
    place_of,
    trials,
)
from nobackprop.papers.grid import TUNED, Cell, by_key, cells, fits, tuned
from nobackprop.places import CONF, PAPERS, RESULTS
from nobackprop.records.identity import digest, rule_name
from nobackprop.records.record import Record
from nobackprop.training.config import Settings

ANGLE = "angle/update_W"
EXPERIMENT = "+experiment="
Choices = Annotated[list[Annotated[str, BeforeValidator(str)]], Field(min_length=1)]


class Figure(Strict):
    """A published figure: its place in the source, and the cells that it is compared with."""

    table: str
    row: str
    column: str
    value: float = Field(ge=0, le=100)
    unit: Literal["accuracy, %", "error, %"]
    spread: float | None = Field(default=None, ge=0)
    seeds: PositiveInt | None = None
    source: str
    cell: Labels = Field({})

    @property
    def place(self) -> tuple[str, str, str]:
        """Where it is in the source."""
        return self.table, self.row, self.column

    @property
    def accuracy(self) -> float:
        """In percent."""
        return self.value if self.unit == "accuracy, %" else 100 - self.value


class Published(Strict):
    """A paper's published.yaml."""

    paper: str
    link: str | None
    seeds: PositiveInt | None
    note: str = ""  # how its figures came about, where that matters for a comparison, or why there is none
    differs: str = ""  # why ours are other ones, where they are more than two standard deviations away
    figures: list[Figure]

    @model_validator(mode="after")
    def _each_once(self) -> "Published":
        places = [f.place for f in self.figures]
        if twice := [place for place in places if places.count(place) > 1]:
            raise Mistake(f"table {twice[0][0]!r}, row {twice[0][1]!r}, column {twice[0][2]!r} is there twice")
        return self


class NotRun(Strict):
    """Cells that have no runs, and the reason."""

    cells: dict[str, Choices]
    reason: str


class Table(Strict):
    """One table of tables.yaml: its cells and the axes of its rows. Columns are rules, or with `by_rule` rows."""

    name: str
    title: str
    where: dict[str, Choices]
    rows: list[str] = Field(min_length=1)
    apart: list[str]
    against: str | None = None
    drawn: Literal["error", "accuracy"] = "error"
    epochs: PositiveInt | None = None
    by_rule: bool = False
    note: str = ""


class Layout(Strict):
    """A paper's tables.yaml."""

    title: str
    stand_ins: dict[str, str] = Field({})
    tables: list[Table] = Field(min_length=1)


def read(model: Any, path: Path) -> Any:
    """A YAML file as a type or model, such as Claims. Raises Mistake, which names file and key, where it is invalid."""
    try:
        return TypeAdapter(model).validate_python(load(path))
    except ValidationError as e:
        raise Mistake(f"{path}: {faults(e)[0]}") from None


def published() -> dict[str, Published]:
    """The published figures of each paper, by paper."""
    return {path.parent.name: read(Published, path) for path in sorted(PAPERS.glob("*/published.yaml"))}


def papers() -> list[str]:
    """The papers whose tables can be made. Those with the most tests of claims come first."""
    names = [path.parent.name for path in PAPERS.glob("*/tables.yaml")]
    tests = {name: len(trials(fixed)) if (fixed := _claims(name)) else 0 for name in names}
    return sorted(names, key=lambda name: (-tests[name], name))


def _claims(paper: str) -> Claims | None:
    file = PAPERS / paper / "claims.yaml"
    return read(Claims, file) if file.exists() else None


@dataclass(frozen=True)
class Found:
    """A cell with its runs: the records that a table shows, one for each seed, all under the same conditions."""

    labels: Mapping[str, str]
    rule: str
    overrides: Sequence[str]
    records: Sequence[Record] = ()
    all_seeds: Sequence[Record] = ()  # with the same epochs, also those that other rules of the row lack
    epochs: int | None = None
    planned_epochs: int | None = None  # the paper's
    planned_seeds: int | None = None  # the paper's, where they are known
    stand_in: str | None = None  # the dataset that is, or before it is shown may be, taken in place of the paper's
    reason: str = ""  # why there are no records
    figures: Sequence[Figure] = ()

    @cached_property
    def accuracies(self) -> dict[int, float]:
        """Test accuracy by seed, without seeds that diverged before they could be tested."""
        return {r.seed: r.test["accuracy"] for r in self.records if r.test}

    @property
    def tested(self) -> list[float]:
        return list(self.accuracies.values())

    @property
    def diverged(self) -> int:
        return len(self.records) - len(self.accuracies)

    @property
    def mean(self) -> float | None:
        return mean(self.tested) if self.tested else None

    @property
    def deviation(self) -> float | None:
        return stdev(self.tested) if len(self.tested) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval by Student's t, or None for fewer than two seeds."""
        return interval(self.tested) if len(self.tested) > 1 else None

    @property
    def angle(self) -> float | None:
        """The last update's angle to backprop's gradient in degrees: the mean over hidden layers and seeds."""
        last = [record.epochs[-1] for record in self.records if record.test]
        found = []
        for layer in self.layers[:-1]:
            found += [angle for epoch in last if (angle := epoch.get(f"{ANGLE}{layer}")) is not None]
        return mean(found) if found else None

    @property
    def seconds(self) -> float:
        """Seconds of an epoch in the fastest seed, since the others shared the machine with more."""
        return min(r.seconds / max(len(r.epochs), 1) for r in self.all_seeds)

    @cached_property
    def layers(self) -> list[int]:
        """The layers whose updates' angle to the gradient was measured."""
        names = {name for record in self.all_seeds for epoch in record.epochs for name in epoch}
        return sorted(int(name.removeprefix(ANGLE)) for name in names if name.startswith(ANGLE))

    @cached_property
    def by_conditions(self) -> dict[Conditions, list[Record]]:
        """All records of a cell before it is shown."""
        found: dict[Conditions, list[Record]] = defaultdict(list)
        for r in self.records:
            found[Conditions(r.config["dataset"]["name"] != self.stand_in, r.config["max_epochs"])].append(r)
        return found

    @property
    def for_claims(self) -> dict[Conditions, dict[int, Score]]:
        """Accuracies by seed. A seed that diverged before it could be tested counts at chance level."""
        return {
            at: {
                r.seed: Score(
                    r.test["accuracy"] if r.test else 1 / len(r.data.classes), r.data.test, tuple(r.data.classes)
                )
                for r in reversed(records)
            }
            for at, records in self.by_conditions.items()
        }

    @property
    def marks(self) -> list[str]:
        """Sentences on what departs from the paper."""
        found = []
        if self.records and len(self.records) < (self.planned_seeds or 0):
            found.append("fewer seeds than the paper")
        if self.stand_in:
            found.append(f"{self.stand_in} in place of the paper's images")
        if self.diverged:
            found.append("some seeds diverged before they could be tested and are left out of the mean")
        if any(r.diverged_epoch is not None for r in self.records if r.test):
            found.append("some seeds diverged and were tested with their best weights from before")
        return found


@dataclass(frozen=True)
class Row:
    """A row of a table: its choices, and a cell for each rule."""

    labels: Mapping[str, str]
    cells: Mapping[str, Found]

    @property
    def run(self) -> bool:
        return any(cell.records for cell in self.cells.values())

    @property
    def shown(self) -> list[str]:
        """The rules with runs or a published figure."""
        return [rule for rule, cell in self.cells.items() if cell.records or cell.figures]

    @property
    def seeds(self) -> str:
        """The number of seeds, the same in all cells with runs; empty without runs."""
        return str(max((len(cell.records) for cell in self.cells.values()), default=0) or "")

    @property
    def epochs(self) -> str:
        """As `seeds`."""
        return str(max((cell.epochs or 0 for cell in self.cells.values()), default=0) or "")

    @property
    def planned_epochs(self) -> int:
        """The paper's."""
        return max((cell.planned_epochs or 0 for cell in self.cells.values()), default=0)

    @property
    def fewer_epochs(self) -> bool:
        return any(cell.epochs and cell.epochs < self.planned_epochs for cell in self.cells.values())


@dataclass(frozen=True)
class Cost:
    """The cost of a rule's training step, relative to backprop's on the same net."""

    speed: float  # images a second
    memory: float  # above weights and gradients


@dataclass(frozen=True)
class Findings:
    """All that is known of a paper's results."""

    paper: str
    layout: Layout
    published: Published | None
    tables: Mapping[str, Sequence[Row]]
    verdicts: Sequence[Result]
    before: Mapping[tuple[str, str, str], str]  # verdicts of an earlier form of the tests, by claim, reading and place
    claims: Claims | None
    costs: Mapping[str, Mapping[str, Cost]]  # by experiment and rule
    cells: Mapping[Place, Found]  # every cell of the grid

    @property
    def cells_shown(self) -> list[Found]:
        """The cells of all tables, as these show them."""
        return [cell for rows in self.tables.values() for row in rows for cell in row.cells.values()]

    def accuracies(self, labels: Labels) -> Accuracies | str:
        """Those of a cell, for tests, or why there are none."""
        return _accuracies(self.cells, labels)

    def costs_of(self, row: Row) -> Mapping[str, Cost]:
        """The cost of each rule's step in a row's experiment, where it was measured."""
        texts = (text for cell in row.cells.values() for text in cell.overrides)
        experiment = next((text.removeprefix(EXPERIMENT) for text in texts if text.startswith(EXPERIMENT)), "")
        return self.costs.get(experiment, {})


class Composer:
    """Composes many configs that share most choices of groups: these by Hydra, once, and values afterwards."""

    def __init__(self) -> None:
        self.parents: dict[tuple[str, ...], dict[str, Any]] = {}
        self.parser = OverridesParser.create()

    def identity(self, overrides: Iterable[str]) -> dict[str, Any]:
        """The identity of the config that these overrides make."""
        overrides = list(overrides)
        every = by_key(text for text in overrides if not text.startswith(TUNED))
        groups = {name: text for name, text in every.items() if (CONF / name.lstrip("+").partition("@")[0]).is_dir()}
        file = tuned(overrides)
        content: Any = OmegaConf.merge(self._parent(tuple(groups.values())), load(file) if file else {})
        for override in self.parser.parse_overrides([text for name, text in every.items() if name not in groups]):
            OmegaConf.update(content, override.key_or_group, override.value())
        return Settings.of(content).identity()

    def _parent(self, groups: tuple[str, ...]) -> dict[str, Any]:
        if groups not in self.parents:
            content: Any = OmegaConf.to_container(compose(groups)[0])
            self.parents[groups] = content
        return self.parents[groups]


LENGTHS = ("T_max", "total_iters")  # of torch's schedules that end with the run


class Runs:
    """Recorded runs, found by the config of a cell, for any number of epochs."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.composer = Composer()
        self.runs: dict[str, list[Record]] = defaultdict(list)
        for record in records:
            self.runs[_without_epochs(record.config)].append(record)

    def of(self, overrides: Sequence[str]) -> tuple[dict[str, Any], list[Record]]:
        """The identity of a cell's config, and its records."""
        identity = self.composer.identity(overrides)
        return identity, list(self.runs.get(_without_epochs(identity), ()))


def _without_epochs(config: Mapping[str, Any]) -> str:
    """The key that runs share if they differ only in their number of epochs, and in a schedule that is as long."""
    epochs, schedule = config["max_epochs"], config.get("schedule") or {}
    kept = {name: value for name, value in schedule.items() if name not in LENGTHS or value != epochs}
    return digest({**config, "max_epochs": None, "schedule": kept})


def findings(paper: str, records: Iterable[Record], results: Path = RESULTS) -> Findings:
    """All results of a paper. Raises Mistake for an invalid file in results/ or papers/."""
    layout = read(Layout, PAPERS / paper / "tables.yaml")
    known = published().get(paper)
    every_not_run = read(dict[str, list[NotRun]], results / "not_run.yaml")
    if unknown := sorted(every_not_run.keys() - papers()):
        raise Mistake(f"not_run.yaml: no paper {', '.join(unknown)}; choose from {', '.join(papers())}")
    not_run = every_not_run.get(paper, [])
    fixed = _claims(paper)
    runs = Runs(records)
    grid = list(cells(paper))
    for place, labels in _named(layout, known, not_run):
        _check_labels(place, labels, grid)
    found = [_find(cell, layout, runs, not_run, known) for cell in grid]
    tables = {table.name: _rows(table, found) for table in layout.tables}
    every = {place_of(cell.labels): cell for cell in found}
    verdicts = judge(fixed, partial(_accuracies, every)) if fixed else []
    before = verdicts_before(paper, results / "verdicts_before.csv")
    return Findings(paper, layout, known, tables, verdicts, before, fixed, costs(results / "benchmark.csv"), every)


def _accuracies(every: Mapping[Place, Found], labels: Labels) -> Accuracies | str:
    cell = every.get(place_of(labels))
    if cell is None:
        unknown = [c for axis, c in labels.items() if all(cell.labels.get(axis) != c for cell in every.values())]
        return f"not in the grid: {', '.join(unknown) or described(labels)}"
    return cell.for_claims or cell.reason


def verdicts_before(paper: str, path: Path) -> dict[tuple[str, str, str], str]:
    """A paper's verdicts in an earlier form of the tests, with their date. Empty where there is no such file."""
    if not path.exists():
        return {}
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    lines = [line for line in frame.to_dict("records") if line["paper"] == paper]
    return {(r["claim"], r["reading"], r["where"]): f"{r['verdict']} ({r['date']})" for r in lines}


def costs(path: Path) -> dict[str, dict[str, Cost]]:
    """Costs by experiment and rule, from the file of benchmarks/benchmark.py; empty if there is none.

    Raises Mistake for a file without its columns.
    """
    if not path.exists():
        return {}
    frame = pd.read_csv(path)
    if missing := {"measure", "what", "ratio"} - set(frame):
        raise Mistake(f"{path} has no column {', '.join(sorted(missing))}: benchmarks/benchmark.py makes it anew")
    ratios = {str(measure): rows.set_index("what").ratio.to_dict() for measure, rows in frame.groupby("measure")}
    found = {}
    for measure, speeds in ratios.items():
        kind, _, experiment = measure.partition(": ")
        if kind == "every rule":
            memory = ratios[f"memory of every rule: {experiment}"]
            found[experiment] = {rule: Cost(speed, memory[rule]) for rule, speed in speeds.items()}
    return found


def rules_run(rows: Sequence[Row]) -> list[str]:
    """The rules with runs in a table, in the grid's order."""
    return list(dict.fromkeys(rule for row in rows for rule, cell in row.cells.items() if cell.records))


def described(labels: Mapping[str, str]) -> str:
    """Choices in words, such as `mnist, 3 hidden layers`. A bare number is named after its axis."""
    return ", ".join(f"{v} {k}" if v.isdigit() else v for k, v in labels.items()).replace("_", " ")


def _named(
    layout: Layout, known: Published | None, not_run: Sequence[NotRun]
) -> list[tuple[str, dict[str, list[str]]]]:
    """Every mention of cells in the files that describe results, with its place."""
    places = [(f"table {table.name}", dict(table.where)) for table in layout.tables]
    places += [(f"not_run.yaml, {entry.reason}", dict(entry.cells)) for entry in not_run]
    figures = known.figures if known else []
    return places + [
        (f"published figure {f.table}, {f.row}, {f.column}", {axis: [choice] for axis, choice in f.cell.items()})
        for f in figures
    ]


def _check_labels(place: str, where: Mapping[str, Sequence[str]], grid: Sequence[Cell]) -> None:
    """Raises Mistake for an axis or a choice that the grid does not have, and for choices that fit no cell."""
    for axis, choices in where.items():
        known = {cell.labels[axis]: None for cell in grid if axis in cell.labels}
        for choice in choices:
            if choice not in known:
                allowed = f"choose from {', '.join(known)}" if known else "there is no such axis"
                raise Mistake(f"{place}: {axis}={choice} is not in the grid; {allowed}")
    if not any(fits(cell.labels, where) for cell in grid):
        given = described({axis: ",".join(choices) for axis, choices in where.items()})
        raise Mistake(f"{place}: no cell of the grid is {given}; its choices do not occur together")


def _find(cell: Cell, layout: Layout, runs: Runs, not_run: Sequence[NotRun], known: Published | None) -> Found:
    """A cell of the grid with all its records. A table decides later which of them it shows."""
    overrides = list(cell.overrides)
    figures = [f for f in (known.figures if known else ()) if f.cell and f.cell.items() <= cell.labels.items()]
    figures = [f.model_copy(update={"seeds": f.seeds or (known and known.seeds)}) for f in figures]
    unsearched = cell.tuned is not None and not cell.tuned.exists()
    reasons = [entry.reason for entry in not_run if fits(cell.labels, entry.cells)]
    reasons += ["settings not searched yet" if unsearched else "not run yet"]
    if unsearched or not runs.runs:
        return Found(cell.labels, cell.labels.get("rule", ""), overrides, reason=reasons[0], figures=figures)
    identity, records = runs.of(overrides)
    stand_in = layout.stand_ins.get(identity["dataset"]["name"])
    if stand_in:
        records = records + runs.of([*overrides, f"dataset={stand_in}"])[1]
    return Found(
        cell.labels,
        cell.labels.get("rule", rule_name(identity["rule"])),
        overrides,
        records,
        planned_epochs=identity["max_epochs"],
        planned_seeds=known.seeds if known else None,
        stand_in=stand_in,
        reason=reasons[0],
        figures=figures,
    )


def _rows(table: Table, found: Sequence[Found]) -> list[Row]:
    """A table's rows. Every cell has the records that can be compared within the table.

    Within a row all rules have the same seeds: those that every rule with runs has. All rows of a combination of
    `apart` are of the same images and have the same number of epochs, the table's if it names one. Conditions under
    which the most cells can be shown come first, of these the paper's own images, then the most epochs. Raises Mistake
    where `rows` leaves out an axis, so that two cells would share a place.
    """
    groups: dict[tuple[str | None, ...], dict[tuple[str, ...], list[Found]]] = defaultdict(lambda: defaultdict(list))
    taken: dict[tuple[str, ...], Found] = {}
    for cell in found:
        if fits(cell.labels, table.where):
            apart = tuple(cell.labels.get(axis) for axis in table.apart)
            place = tuple(cell.labels.get(axis, "") for axis in table.rows)
            groups[apart][place].append(cell)
            other = taken.setdefault((*place, cell.rule), cell)
            if axes := [axis for axis, choice in cell.labels.items() if choice != other.labels.get(axis)]:
                both = f"{described(other.labels)} and {described(cell.labels)}"
                raise Mistake(f"table {table.name}: {both} have one place; add to its rows: {', '.join(axes)}")
    rows = []
    for group in groups.values():
        counts: dict[Conditions, int] = {}
        for at in {at for row in group.values() for cell in row for at in cell.by_conditions}:
            if table.epochs in (None, at.epochs):
                counts[at] = sum(len(_at(at, row)) for row in group.values() if _seeds(_at(at, row)))
        at = max(counts, key=lambda at: (counts[at], at), default=Conditions(True, table.epochs or 0))
        for labels, row in group.items():
            shown = _at(at, row)
            cells = {cell.rule: _showing(cell, at, shown.get(cell.rule, ()), _seeds(shown)) for cell in row}
            named = {axis: choice for axis, choice in zip(table.rows, labels, strict=True) if choice}
            rows.append(Row(named, cells))
    return rows


def _at(at: Conditions, row: Sequence[Found]) -> dict[str, list[Record]]:
    """The records of a row under these conditions, by rule, without rules that have none."""
    return {cell.rule: records for cell in row if (records := cell.by_conditions.get(at))}


def _seeds(shown: Mapping[str, Sequence[Record]]) -> list[int]:
    """The seeds that all rules have."""
    return sorted(set.intersection(*({r.seed for r in records} for records in shown.values()))) if shown else []


def _showing(cell: Found, at: Conditions, records: Sequence[Record], seeds: Sequence[int]) -> Found:
    first: dict[int, Record] = {}
    for record in records:
        first.setdefault(record.seed, record)
    shown = [first[seed] for seed in seeds if seed in first]
    if shown:
        stand_in = None if at.own_images else cell.stand_in
        overrides = [*cell.overrides, *([f"dataset={stand_in}"] if stand_in else [])]
        every = list(first.values())
        return replace(cell, records=shown, all_seeds=every, epochs=at.epochs, stand_in=stand_in, overrides=overrides)
    recorded = sorted({r.config["max_epochs"] for r in cell.records})
    if not recorded:
        reason = cell.reason
    elif at in cell.by_conditions:
        reason = "no seed in common with the other rules"
    elif at.epochs in recorded:
        reason = "trained on other images"
    else:
        reason = f"trained for {', '.join(map(str, recorded))} epochs, not for {at.epochs}"
    return replace(cell, records=(), stand_in=None, reason=reason)
