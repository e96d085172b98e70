"""Run records: one JSON line per run and seed, written whole or not at all, and checked when read."""

import re
from collections.abc import Iterable, Sequence
from math import isfinite, prod
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json, to_json

from nobackprop.mistakes import Mistake, faults
from nobackprop.records.files import checksum, write_atomically
from nobackprop.records.identity import EXACT, digest, run_name
from nobackprop.records.literal import plain

# The beginning of a record's line. In format 2 it has the checksum of all that follows, in format 1 it has none.
SEALED = re.compile(rb'\{"format":2,"checksum":"([0-9a-f]{16})",')
PLAIN = re.compile(rb'\{\s*"format"\s*:\s*1\s*,')
EDITS = "+edits"  # after a commit whose source was edited
OWN = "+own"  # and, after both, before the checksum of code of the user's own that a config names
Word = Annotated[str, Field(pattern=r"^\w+$")]
Count = Annotated[int, Field(gt=0, lt=EXACT)]
Number = Annotated[int, Field(gt=-EXACT, lt=EXACT)] | float | None  # None: not finite


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(_Strict):
    """The images that were trained on. `classes[i]` is the dataset's class that became label i."""

    name: str
    fingerprint: Word
    classes: Annotated[list[NonNegativeInt], Field(min_length=1)]
    train: Count
    validation: Count
    test: Count


class Machine(_Strict):
    """What trained it."""

    system: str
    processor: str
    cores: Count  # that this process may run on; a container's quota may grant less
    device: str
    threads: Count
    matmul: str  # torch's float32_matmul_precision
    compiled: bool
    devices: Count  # each device trained on its part of every mini-batch
    kernels: bool | Literal["in part"] = False  # this program's own, in the place of torch's


class _Read(BaseModel):
    """The part of a config that readers of records rely on. It may hold more."""

    model_config = ConfigDict(strict=True)


class _Component(_Read):
    target: Annotated[str, Field(alias="_target_", pattern=r"^\w+(\.\w+)+$")]


class _Dataset(_Read):
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    classes: int | None


class _Config(_Read):
    rule: _Component
    arch: _Component
    dataset: _Dataset
    batch_size: Count
    max_epochs: Count


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    try:
        _Config.model_validate(config)
    except ValidationError as e:
        raise Mistake(_first(e)) from None
    return config


def _first(e: ValidationError) -> str:
    """The first error, after the place where it is."""
    return plain(faults(e)[0])


class _Range(_Strict):
    """Integers from the first number up to, but without, the second, in steps of the third."""

    range: Annotated[list[int], Field(min_length=3, max_length=3)]

    def numbers(self) -> Iterable[int]:
        return range(*self.range)


class _Counts(_Strict):
    """Fractions as counts of a total."""

    of: PositiveInt
    counts: list[NonNegativeInt]

    def numbers(self) -> Iterable[float]:
        return [count / self.of for count in self.counts]


class _Columns(_Strict):
    """The epochs as `Record.line` writes them."""

    columns: dict[str, list[Any] | _Counts | _Range]


def _rows(epochs: Any) -> Any:
    """The epochs, one dict each: from what `record.json` has, or from the columns that `Record.line` writes."""
    if not isinstance(epochs, dict):
        return epochs
    try:
        columns = _Columns(columns=epochs).columns
        # A list is as long as the line that holds it; ranges alone could be of any length.
        if isinstance(columns.get("val/accuracy"), _Range | None):
            raise Mistake("val/accuracy: a column of numbers is needed")
        values = [column if isinstance(column, list) else column.numbers() for column in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
    except ValidationError as e:
        raise Mistake(f"damaged columns ({_first(e)})") from None
    except (ArithmeticError, ValueError) as e:
        raise Mistake(f"damaged columns ({e})") from None


def _finite(scores: Any) -> Any:
    """The same numbers without infinities and NaN, which JSON can't hold."""
    if not isinstance(scores, dict):
        return scores
    return {name: v for name, v in scores.items() if not isinstance(v, float) or isfinite(v)}


def _packed(column: list[Any], totals: Iterable[int]) -> Any:
    """The shortest form that gives every number back to the bit: a range, counts of a total, or the numbers."""
    if all(type(value) is int for value in column):
        step = column[1] - column[0] if len(column) > 1 else 1
        evenly = step > 0 and all(value == column[0] + i * step for i, value in enumerate(column))
        return {"range": [column[0], column[-1] + 1, step]} if evenly else column
    if all(type(value) is float and 0 <= value <= 1 for value in column):
        values = np.array(column)
        for total in totals:
            counts = np.rint(values * total).astype(int)
            if (counts / total).tobytes() == values.tobytes():
                return {"of": total, "counts": counts.tolist()}
    return column


class Record(_Strict):
    """One seed of one run. Its key is (signature, seed). Accuracies are fractions, times are seconds."""

    signature: str  # the hash of `config`
    seed: NonNegativeInt
    name: str
    config: Annotated[dict[str, Any], AfterValidator(_complete)]  # what identifies the result: Settings.identity()
    command: str
    commit: Word | None  # of the process that finished
    dirty: bool | None
    # The commits that trained it, in order, with +edits where the source was edited, or `unknown`; each with +own and a
    # checksum where the config names code of the user's own. It is empty in records from before this field.
    commits: list[Annotated[str, Field(pattern=r"^\w+(\+edits)?(\+own\w+)?$")]] = []
    versions: dict[str, str]
    data: Data
    machine: Machine
    precision: str
    stacked: Count  # how many seeds were trained together
    finished: str  # date and time, UTC
    wall_s: NonNegativeFloat  # of this seed, or of the stack it was trained in
    steps: Count
    epochs: Annotated[list[dict[str, Number]], BeforeValidator(_rows), Field(min_length=1)]
    best_epoch: PositiveInt | None
    diverged_epoch: PositiveInt | None
    # None where the run diverged before any epoch was over.
    test: Annotated[dict[str, float], BeforeValidator(_finite)] | None

    @model_validator(mode="after")
    def _one_whole(self) -> Self:
        """Raises Mistake where fields do not fit each other."""
        c, count = self.config, len(self.epochs)
        if self.signature != (expected := digest(c)):
            raise Mistake(f"the signature is {self.signature}, that of the config is {expected}")
        if self.name != (expected := run_name(c["rule"], c["arch"], c["dataset"]["name"])):
            raise Mistake(f"the name is {self.name}, that of the config is {expected}")
        step = 0
        for number, epoch in enumerate(self.epochs, 1):
            if epoch.get("epoch") != number:
                raise Mistake(f"epochs: the numbers are not 1 to {count}")
            before, step = step, epoch.get("step")
            if not isinstance(step, int) or step <= before:
                raise Mistake(f"epochs: the steps do not grow up to epoch {number}")
            if not _is_fraction(epoch.get("val/accuracy")) or "val/loss" not in epoch:
                raise Mistake(f"epochs: number {number} lacks val/loss, or a val/accuracy between 0 and 1")
        if count > c["max_epochs"] or self.steps != step:
            raise Mistake(
                f"{count} epochs and {step} steps do not fit max_epochs={c['max_epochs']}, steps={self.steps}"
            )
        if (self.best_epoch is None) != (self.test is None) or (self.best_epoch or 0) > count:
            raise Mistake(f"best_epoch is {self.best_epoch} of {count} epochs, test is {self.test}")
        if self.diverged_epoch not in (None, count):
            raise Mistake(f"diverged_epoch is {self.diverged_epoch}, the last epoch is {count}")
        if self.test is not None and not _is_fraction(self.test.get("accuracy")):
            raise Mistake("test lacks an accuracy between 0 and 1")
        return self

    @property
    def run(self) -> str:
        """The name of the run's folder."""
        return f"{self.name}-{self.signature}"

    @property
    def seconds(self) -> float:
        """This seed's share of the wall time."""
        return self.wall_s / self.stacked

    @property
    def best(self) -> dict[str, int | float | None]:
        """The epoch with the best validation accuracy; empty where the run diverged before the first was over."""
        return self.epochs[self.best_epoch - 1] if self.best_epoch else {}

    @property
    def validation(self) -> float:
        """The best validation accuracy; 0 where the run diverged."""
        return 0.0 if self.diverged_epoch else self.best.get("val/accuracy") or 0.0

    @property
    def code(self) -> list[str]:
        """The commits that trained it, as in `commits`."""
        return self.commits or [code(self.commit, self.dirty)]

    def write(self, path: Path) -> None:
        """Writes the record as one line, atomically: a reader, or a power cut, finds all of it or nothing."""
        write_atomically(path, _sealed(self.model_dump_json().encode()))

    def line(self) -> bytes:
        """The record as one short line that `parse` reads back to the bit: epochs are columns, accuracies counts."""
        record = self.model_dump(exclude={"epochs"})
        record["epochs"] = self.epochs
        if all(epoch.keys() == self.epochs[0].keys() for epoch in self.epochs):  # else: as they are
            trained: Any = self.epochs[0]["step"], self.config["batch_size"]
            totals = [n for n in (self.data.validation, prod(trained), self.data.train) if n < EXACT]
            record["epochs"] = {n: _packed([epoch[n] for epoch in self.epochs], totals) for n in self.epochs[0]}
        return _sealed(to_json(record))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises Mistake, naming the file, where it holds no valid record."""
        return cls.parse(path.read_bytes(), str(path), "delete it to run this seed again")

    @classmethod
    def parse(cls, content: bytes, path: str, remedy: str) -> Self:
        """The record in a line that was read at `path`. The Mistake for an invalid one has the path and the remedy."""
        if start := SEALED.match(content):
            if checksum(content[start.end() :].rstrip(b"\r\n")) != start[1].decode():
                raise Mistake(f"{path} is damaged (its checksum does not fit): {remedy}")
        elif not (start := PLAIN.match(content)):
            raise Mistake(_no_record(content, path, remedy))
        try:
            return cls.model_validate_json(b"{" + content[start.end() :])
        except ValidationError as e:
            raise Mistake(f"{path} is no valid run record ({_first(e)}): {remedy}") from None


def _no_record(content: bytes, path: str, remedy: str) -> str:
    """The message on a line that does not begin as a record's does."""
    try:
        found = from_json(content)
    except ValueError as e:
        return f"{path} is no valid run record ({plain(str(e))}): {remedy}"
    known = found.get("format") if isinstance(found, dict) else None
    if isinstance(known, int) and known > 2:
        return (
            f"{path} is of record format {known}, which this version does not know: use the version that wrote it, or "
            f"another paths.runs; if none wrote it, {remedy}"
        )
    return f"{path} is no valid run record (it does not begin with its format and checksum): {remedy}"


def _is_fraction(value: Number) -> bool:
    return isinstance(value, float) and 0 <= value <= 1


def _sealed(record: bytes) -> bytes:
    """A record's JSON as a line of format 2."""
    rest = record.removeprefix(b"{")
    return b'{"format":2,"checksum":"%s",%s\n' % (checksum(rest).encode(), rest)


def tested(records: Iterable[Record]) -> list[float]:
    """The test accuracies of those records that have one."""
    return [record.test["accuracy"] for record in records if record.test]


def mean_and_deviation(fractions: Sequence[float]) -> str:
    """The mean in percent, with the standard deviation of several; a dash where there is no number."""
    if not fractions:
        return "-"
    return f"{mean(fractions):.2%}" + (f" ± {stdev(fractions):.2%}" if len(fractions) > 1 else "")


def code(commit: str | None, dirty: bool | None) -> str:
    """A state of the source as an entry of `Record.commits`."""
    return f"{commit}{EDITS if dirty else ''}" if commit else "unknown"
