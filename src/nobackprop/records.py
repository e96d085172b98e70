"""Run records: one JSON line per run and seed, written whole or not at all, and checked when read."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from math import prod
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)
from pydantic_core import to_json

from nobackprop.mistakes import Mistake

# Options whose value, in the same argument or the next, says where things are on this machine; and all such arguments.
LOCAL_OPTIONS = ("--runs", "--config-dir", "--config-path", "-cd", "-cp")
LOCAL = re.compile(
    rf"^[+~]*paths\.|^[+~]*hydra\.(run|sweep|searchpath)\b|\.(root|cache)=|^({'|'.join(LOCAL_OPTIONS)})\b"
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Strict):
    """What was trained on; `classes[i]` is the dataset's class that became label i."""

    name: str
    fingerprint: str
    classes: list[NonNegativeInt]
    train: PositiveInt
    validation: PositiveInt
    test: PositiveInt


class Machine(_Strict):
    """What trained it."""

    system: str
    processor: str
    cores: PositiveInt  # that this process may run on, of which a container's quota may grant less
    device: str
    threads: PositiveInt
    matmul: str  # torch's float32_matmul_precision
    compiled: bool
    devices: PositiveInt  # each trained on its part of every mini-batch


def _rows(epochs: Any) -> Any:
    """The epochs, one dict each: from what `record.json` has, or from the columns that `Record.line` writes."""
    if not isinstance(epochs, dict):
        return epochs
    try:
        columns = {name: _unpacked(column) for name, column in epochs.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    except (TypeError, KeyError, ArithmeticError, ValueError) as e:
        raise Mistake(f"damaged columns ({e})") from None


def _unpacked(column: Any) -> Sequence[Any]:
    if not isinstance(column, dict):
        return column
    if "range" in column:
        return range(*column["range"])
    return [count / column["of"] for count in column["counts"]]


def _packed(column: list[Any], totals: Iterable[int]) -> Any:
    """The shortest form that gives every number back to the bit: a range, counts out of a total, or as it is."""
    if all(type(value) is int for value in column):
        step = column[1] - column[0] if len(column) > 1 else 1
        numbers = [column[0], column[-1] + 1, step]
        return {"range": numbers} if step > 0 and column == list(range(*numbers)) else column
    if all(type(value) is float and 0 <= value <= 1 for value in column):
        values = np.array(column)
        for total in totals:
            counts = np.rint(values * total).astype(int)
            if (counts / total).tobytes() == values.tobytes():
                return {"of": total, "counts": counts.tolist()}
    return column


class Record(_Strict):
    """One seed of one run. Its key is (signature, seed). Accuracies are fractions, times are seconds."""

    format: Literal[1] = 1
    signature: str
    seed: NonNegativeInt
    name: str
    config: dict[str, Any]  # what identifies the result: Settings.identity()
    command: str
    commit: str | None
    dirty: bool | None
    commits: list[str] = []  # of all code that trained it, in order; with "+edits" where it was edited, or "unknown"
    versions: dict[str, str]
    data: Data
    machine: Machine
    precision: str
    stacked: PositiveInt  # how many seeds were trained together
    finished: str  # date and time, UTC
    wall_s: NonNegativeFloat  # of this seed, or of the stack it was trained in
    steps: NonNegativeInt
    epochs: Annotated[list[dict[str, int | float | None]], BeforeValidator(_rows)]
    best_epoch: PositiveInt | None
    diverged_epoch: PositiveInt | None
    test: dict[str, float] | None  # None where the run diverged before any epoch was over

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
        """The epoch with the best validation accuracy; empty where the run diverged before any was over."""
        return self.epochs[self.best_epoch - 1] if self.best_epoch else {}

    @property
    def validation(self) -> float:
        """The best validation accuracy; 0 where the run diverged."""
        return 0.0 if self.diverged_epoch else self.best.get("val/accuracy") or 0.0

    def write(self, path: Path) -> None:
        """Writes the record as one line, atomically: a reader, or a power cut, finds all of it or nothing."""
        write_atomically(path, (self.model_dump_json() + "\n").encode())

    def line(self) -> bytes:
        """The record as one short line that `parse` reads back to the bit: epochs are columns, accuracies counts."""
        record = self.model_dump(exclude={"epochs"})
        record["epochs"] = self.epochs
        if self.epochs and all(epoch.keys() == self.epochs[0].keys() for epoch in self.epochs):  # else: as they are
            trained: Any = self.epochs[0].get("step") or 0, self.config.get("batch_size") or 0
            totals = [total for total in (self.data.validation, prod(trained), self.data.train) if total]
            record["epochs"] = {n: _packed([epoch[n] for epoch in self.epochs], totals) for n in self.epochs[0]}
        return to_json(record) + b"\n"

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Raises Mistake, naming the file, where it holds no valid record."""
        return cls.parse(path.read_bytes(), str(path), "delete it to run this seed again")

    @classmethod
    def parse(cls, content: bytes, path: str, remedy: str) -> "Record":
        """A record from JSON that was read at `path`; the Mistake for no valid record names it, and the remedy."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as e:
            error = next((error for error in e.errors() if error["loc"] == ("format",)), e.errors()[0])
            where = ".".join(str(part) for part in error["loc"]) or "the file"
            if where == "format":
                raise Mistake(
                    f"{path} is of record format {error['input']!r}, which this version does not know: use the version "
                    "that wrote it, or another paths.runs"
                ) from None
            raise Mistake(f"{path} is no valid run record ({where}: {error['msg']}): {remedy}") from None


def tested(records: Iterable[Record]) -> list[float]:
    """The test accuracies of those that have one."""
    return [record.test["accuracy"] for record in records if record.test]


def mean_and_deviation(fractions: Sequence[float]) -> str:
    """The mean in percent, with the standard deviation where there are several; a dash where there is none."""
    if not fractions:
        return "-"
    return f"{mean(fractions):.2%}" + (f" ± {stdev(fractions):.2%}" if len(fractions) > 1 else "")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it is either whole or absent, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)  # there only where something went wrong, such as a full disk


def remove_unfinished(folder: Path, alone: bool = False) -> None:
    """Removes what `write_atomically` left in a folder when its process was killed.

    That is told of this machine's processes; what another machine's have left is removed after a day. `alone`: nobody
    can be writing there, so all is.
    """
    for path in unfinished(folder):
        file, _, pid = path.name.rpartition(".")
        with suppress(FileNotFoundError):  # it was written meanwhile
            killed = file.endswith(f".{platform.node()}") and not _runs(int(pid))
            if alone or killed or time.time() - path.stat().st_mtime > 86_400:
                path.unlink()


def unfinished(folder: Path) -> list[Path]:
    """The files in a folder that `write_atomically` has begun."""
    return [path for path in folder.glob(".*.*") if path.suffix[1:].isdecimal() and path.is_file()]


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def command() -> str:
    """The command of this process, without what says where things are on this machine."""
    pairs = zip(sys.argv, sys.argv[1:], strict=False)
    kept = [text for before, text in pairs if not LOCAL.search(text) and before not in LOCAL_OPTIONS]
    followed = zip(kept, [*kept[1:], "--"], strict=False)
    kept = [text for text, after in followed if text != "--set" or not after.startswith("--")]
    name = Path(sys.argv[0]).name
    return shlex.join(["nobackprop" if name == "__main__.py" else name, *kept])


@cache
def source_state() -> tuple[str | None, bool | None]:
    """The commit of the checkout this package runs from and whether it was changed; (None, None) outside a checkout.

    A sweep's copy of the package has them in a file.
    """
    here = Path(__file__)
    if (copied := here.with_name("source.json")).exists():
        state = json.loads(copied.read_text())
        return state["commit"], state["dirty"]

    def git(*args: str) -> str:
        result = subprocess.run(
            ["git", "-C", str(here.parent), *args], capture_output=True, text=True, check=True, timeout=30
        )
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a package inside somebody else's repository is not ours
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def other_code(records: Iterable[Record]) -> str:
    """Which other commits made records, as in `commit 1a2b3c4 with edits`; empty where it was this code.

    A record's key is its config and seed; that says nothing of the code. Edits can't be compared, so they always count.
    """
    now = source_state()
    others = {(r.commit, r.dirty) for r in records if (r.commit, r.dirty) != now or r.dirty}
    return ", ".join(
        sorted(
            f"commit {commit[:7]}{' with edits' * bool(dirty)}" if commit else "no commit" for commit, dirty in others
        )
    )


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute."""
    packages = ("nobackprop", "torch", "pytorch-lightning", "torchmetrics", "hydra-core", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def machine(device: torch.device, compiled: bool = False, devices: int = 1) -> Machine:
    """This machine, as it trains on that device, one of so many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        system=platform.system(),
        processor=_processor(),
        cores=cores,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        matmul=torch.get_float32_matmul_precision(),
        compiled=compiled,
        devices=devices,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
