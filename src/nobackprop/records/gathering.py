"""Gathers run records from any number of places into one file of lines, and into tidy tables.

A file of lines (`results/records/<name>.jsonl`) holds one line per run and seed, and is only ever appended to. Its key
is (signature, seed). Gathered again, a folder adds only what is new.

Every line has its checksum (record.py), except lines of record format 1. Their checksums are in a file beside theirs,
`<name>.jsonl.checksums`, one for each line. `scripts/check.py --add-checksums` makes that file. Without it the lines
are read, too, but damage to them is not noticed.
"""

import fcntl
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic_core import to_json

from nobackprop.mistakes import Missing, Mistake
from nobackprop.records.files import checksum, write_atomically
from nobackprop.records.literal import cell
from nobackprop.records.record import SEALED, Record

if TYPE_CHECKING:  # takes seconds to import, and only a table needs it
    import pandas as pd

Key = tuple[str, int]
START = b'{"format":'  # of every record's line
RESULTS = ("data", "steps", "epochs", "best_epoch", "diverged_epoch", "test")  # a repeated run has the same
COPY = "from a copy of the file, such as git's"
SEED_FOLDERS = ("", "seed*/", "*/seed*/")  # within a folder of one seed, of one run, of runs


@dataclass
class _Found:
    """The results that were found, by (signature, seed), and sentences on records that could not be taken."""

    results: dict[Key, tuple[float | None, Sequence[int]]] = field(default_factory=dict)  # test accuracy, hashes
    unreadable: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)

    def is_first(self, record: Record, origin: str) -> bool:
        """Whether a record is the first with its key. Notes a later one whose results differ from the first."""
        accuracy = record.test["accuracy"] if record.test else None
        found = accuracy, [hash(to_json(getattr(record, name))) for name in RESULTS]
        first = self.results.setdefault((record.signature, record.seed), found)
        differ = [name for name, a, b in zip(RESULTS, first[1], found[1], strict=True) if a != b]
        if differ:
            both = " and ".join("none" if a is None else f"{a:.2%}" for a in (first[0], accuracy))
            self.conflicts.append(
                f"{origin}: another record of seed {record.seed} of {record.run} was there first, "
                f"and stays; they differ in {', '.join(differ)} (test accuracies {both})"
            )
        return first is found


@dataclass
class Collected(_Found):
    """The same, with the records by (signature, seed)."""

    records: dict[Key, Record] = field(default_factory=dict)


@dataclass
class Gathered(_Found):
    """The same after gathering. `added` is the number of new records."""

    added: int = 0


def collect(sources: Iterable[str | Path]) -> Collected:
    """The records in folders and files of lines.

    A folder holds files of lines (*.jsonl), runs, one run, or one seed. A seed without a record is still being trained
    and is passed over. A record that can't be read is passed over, too, and named in the result. So is a record whose
    results differ from those of an earlier one of the same run and seed. Raises Missing for a source that does not
    exist, and Mistake, naming the line, for a damaged line in a file of lines.
    """
    found = Collected()
    for record, origin in _read(_existing(sources), found):
        if found.is_first(record, origin):
            found.records[record.signature, record.seed] = record
    return found


def gather(sources: Iterable[str | Path], into: Path) -> Gathered:
    """Appends what is new in folders and files of lines, as `collect` finds it, to a file of lines.

    Only one record is in memory at a time. Several processes may gather into one file: they wait for each other. Raises
    the same as `collect`, and then leaves the file unchanged. Its last line may have been cut off by a crash. It is
    then removed, or completed if only its end of line is missing.
    """
    found, places = Gathered(), _existing(sources)
    into.parent.mkdir(parents=True, exist_ok=True)
    with into.open("a+b") as file, TemporaryFile(dir=into.parent) as new:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        file.seek(0)
        last = b"".join(deque(file, maxlen=1))
        end = b"" if last.endswith(b"\n") or not last else b"\n"  # an editor left it out
        cut = end and _cut_off(last)  # a crash while it was written; the run's folder still has that record
        file.seek(0)
        for record, origin in _lines((line for line in file if not cut or line.endswith(b"\n")), into):
            found.is_first(record, origin)
        if cut:
            found.unreadable.append(f"{into}: the last line was cut off and is removed")
        for record, origin in _read(places, found):
            if found.is_first(record, origin):
                new.write(record.line())
                found.added += 1
        new.seek(0)
        if cut:
            file.truncate(file.seek(0, os.SEEK_END) - len(last))
        else:
            file.write(end)
        copyfileobj(new, file)
        file.flush()
        os.fsync(file.fileno())
    return found


def _existing(sources: Iterable[str | Path]) -> list[Path]:
    paths = [Path(source) for source in sources]
    for path in paths:
        if not path.exists():
            raise Missing(f"{path} does not exist: give a folder of runs, or a .jsonl file of their records")
    return paths


def _read(sources: Iterable[Path], found: _Found) -> Iterator[tuple[Record, str]]:
    """The records in these places, each with its place. Notes those in folders of runs that can't be read."""
    for source in sources:
        for path in [source] if source.is_file() else sorted(source.glob("*.jsonl")):
            yield from read_lines(path)
        for within in SEED_FOLDERS:
            for path in sorted(source.glob(f"{within}record.json"), key=_run_and_seed):
                try:
                    record = Record.read(path)
                except (Mistake, OSError) as e:
                    found.unreadable.append(str(e))
                else:
                    yield record, str(path)


def _run_and_seed(path: Path) -> tuple[Path, int, str]:
    """The order of records: seed 10 after seed 9."""
    return path.parent.parent, len(path.parent.name), path.parent.name


def read_lines(path: Path) -> Iterator[tuple[Record, str]]:
    """The records in a file of lines, each with its place. Raises Mistake, naming the line, for a damaged one."""
    with path.open("rb") as file:
        yield from _lines(file, path)


def _lines(lines: Iterable[bytes], path: Path) -> Iterator[tuple[Record, str]]:
    """The same, from lines that were read already."""
    known = _checksums(path)
    left = set(known or ())
    for number, line in enumerate(lines, 1):
        origin = f"{path}, line {number}"
        if not line.strip():
            continue
        record = Record.parse(line, origin, f"take the line {COPY}")
        if known is not None and not SEALED.match(line):
            if (found := checksum(line.rstrip(b"\r\n"))) not in known:
                raise Mistake(
                    f"{origin} is damaged or was edited (its checksum is not in {checksums_of(path)}): take both files "
                    f"{COPY}"
                )
            left.discard(found)
        yield record, origin
    if left:
        raise Mistake(f"{path} lacks {len(left)} lines whose checksums are in {checksums_of(path)}: take it {COPY}")


def checksums_of(path: Path) -> Path:
    """The file of checksums that belongs to a file of lines."""
    return path.with_name(f"{path.name}.checksums")


def _checksums(path: Path) -> set[str] | None:
    """The checksums of a file's lines of record format 1; None where none were made."""
    try:
        content = checksums_of(path).read_bytes()
    except FileNotFoundError:
        return None
    if not re.fullmatch(rb"([0-9a-f]{16}\n)+", content):
        raise Mistake(f"{checksums_of(path)} is damaged: take it {COPY}")
    return set(content.decode().split())


def add_checksums(path: Path) -> int:
    """Makes the file of checksums of a file of lines. Gives the number of lines of record format 1; for 0 none is made.

    Raises Mistake for a damaged line, and where there is such a file already, since it may tell of damage.
    """
    if checksums_of(path).exists():
        raise Mistake(f"{checksums_of(path)} is there already: delete it to trust {path} as it is now")
    for _ in read_lines(path):
        pass
    with path.open("rb") as file:
        old = [checksum(line.rstrip(b"\r\n")) for line in file if line.strip() and not SEALED.match(line)]
    if old:
        write_atomically(checksums_of(path), "".join(f"{one}\n" for one in old).encode())
    return len(old)


def _cut_off(line: bytes) -> bool:
    """Whether this is only the beginning of a record's line: JSON that ends too early."""
    if not (line.startswith(START) or START.startswith(line)):
        return False
    text = line.decode(errors="ignore")  # it may end within a character
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as e:
        # Where a string, a number or a word ends too early, the error's position is its beginning.
        return e.msg.startswith("Unterminated string") or bool(re.fullmatch(r"[\w.+-]*", text[e.pos :]))
    return False


def learning_curves(records: Iterable[Record]) -> np.ndarray:
    """Validation accuracy, (epochs, seeds), from epoch 1 on; NaN where no seed has one.

    A seed that ended before the others keeps its last value, so that a mean is always over the same seeds. The epoch in
    which a seed diverged does not count. A seed that diverged in its first epoch is left out.
    """
    curves = [[e["val/accuracy"] for e in r.epochs if e["epoch"] != r.diverged_epoch] for r in records]
    curves = [curve for curve in curves if curve] or [[float("nan")]]
    longest = max(map(len, curves))
    return np.array([curve + curve[-1:] * (longest - len(curve)) for curve in curves], dtype=float).T


def table(records: Iterable[Record]) -> "pd.DataFrame":
    """A row for each run and seed: what was run, where, and its result. Each setting is a column `config.<key>`."""
    import pandas as pd

    rows = [
        {"name": r.name, "signature": r.signature, "seed": r.seed, "test": r.test or {}, "best": r.best}
        | {"epochs": len(r.epochs)}
        | r.model_dump(exclude={"name", "signature", "seed", "test", "epochs"})
        for r in records
    ]
    if not rows:
        return pd.DataFrame()
    # Lists are made text, so that every column can be compared and written.
    frame = pd.json_normalize(rows).map(lambda value: str(value) if isinstance(value, list) else value)
    return frame.sort_values(["name", "signature", "seed"], ignore_index=True)


def write_table(frame: "pd.DataFrame", path: Path) -> None:
    """Writes a table in the format that the path ends in. Raises Mistake for a format other than .csv and .parquet."""
    if path.suffix not in (".csv", ".parquet"):
        raise Mistake(f"{path}: a table is written as .csv or .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        text: Any = frame.map(lambda value: cell(value) if isinstance(value, str) else value)
        text.to_csv(path, index=False, lineterminator="\n")
    else:
        mixed = {name: "string" for name in frame if frame[name].dtype == object}
        frame.astype(mixed).to_parquet(path, index=False)
