"""Gathers run records from any number of places into one file of lines, and into tidy tables.

A file of lines (`results/records/<name>.jsonl`) holds one line per run and seed, and is only ever appended to. Its key
is (signature, seed). Gathered again, a folder adds only what is new.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from nobackprop.mistakes import Missing, Mistake
from nobackprop.records import Record

Key = tuple[str, int]
START = b'{"format":'  # of every record's line
RESULTS = ("data", "steps", "epochs", "best_epoch", "diverged_epoch", "test")  # that a run made again must have, too


@dataclass
class Collected:
    """What was found: the records by (signature, seed), and in sentences what could not be taken."""

    records: dict[Key, Record] = field(default_factory=dict)
    added: int = 0
    unreadable: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)

    def add(self, record: Record, origin: str) -> bool:
        """Takes a record unless its key has one already, which stays; whether it was taken."""
        first = self.records.setdefault((record.signature, record.seed), record)
        if fields := [name for name in RESULTS if getattr(first, name) != getattr(record, name)]:
            accuracies = " and ".join(f"{r.test['accuracy']:.2%}" if r.test else "none" for r in (first, record))
            self.conflicts.append(
                f"{origin}: another record of seed {record.seed} of {record.run} was there first, "
                f"and stays; they differ in {', '.join(fields)} (test accuracies {accuracies})"
            )
        return first is record


def collect(sources: Iterable[str | Path], into: Path | None = None) -> Collected:
    """Gathers the records in folders and files of lines; with `into`, appends what is new there to that file.

    A folder is one of files of lines (*.jsonl), of runs, of one run, or of one seed; a seed without a record is still
    being trained and is passed over. A record that can't be read is named in the result and passed over too; one with
    other results than an earlier one of the same run and seed is named and does not replace it. Several may gather into
    one file at once: they wait for each other. Raises Missing for a source that does not exist, and
    Mistake, naming the line, for a damaged line in a file of lines; only the last line of `into` may be cut off (a
    crash while it was written), and is then removed, or completed where nothing but its end is missing. A file that
    raises is left as it is.
    """
    sources = [Path(source) for source in sources]
    for source in sources:
        if not source.exists():
            raise Missing(f"{source} does not exist: give a folder of runs, or a .jsonl file of their records")
    found = Collected()
    if into is None:
        _gather(sources, found)
        return found
    into.parent.mkdir(parents=True, exist_ok=True)
    with into.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        content = into.read_bytes()
        whole = content.rfind(b"\n") + 1
        cut = _cut_off(content[whole:])  # a crash while it was written; the run's folder still has that record
        kept = content[:whole] if cut else content
        for record, origin in _lines(into, kept):
            found.add(record, origin)
        if cut:
            found.unreadable.append(f"{into}: the last line was cut off and is removed")
            file.truncate(whole)
        end = b"\n" if len(kept) > whole else b""  # an editor left it out
        new = _gather(sources, found)
        new.sort(key=lambda r: (r.name, r.signature, r.seed))
        file.write(end + b"".join(record.line() for record in new))
        file.flush()
        os.fsync(file.fileno())
    found.added = len(new)
    return found


def _gather(sources: Iterable[Path], found: Collected) -> list[Record]:
    """Adds what the sources hold; gives those records that were new."""
    new = []
    for source in sources:
        for file in [source] if source.is_file() else sorted(source.glob("*.jsonl")):
            new += [record for record, origin in _lines(file, file.read_bytes()) if found.add(record, origin)]
        for pattern in ("record.json", "seed*/record.json", "*/seed*/record.json"):
            for path in sorted(source.glob(pattern)):
                try:
                    record = Record.read(path)
                except (ValueError, OSError) as e:
                    found.unreadable.append(str(e))
                    continue
                if found.add(record, str(path)):
                    new.append(record)
    return new


def _cut_off(line: bytes) -> bool:
    """Whether this is the beginning of a record's line, and no more."""
    if not line or not (line.startswith(START) or START.startswith(line)):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _lines(path: Path, content: bytes) -> Iterator[tuple[Record, str]]:
    """The records in a file of lines, each with where it stands."""
    for number, line in enumerate(content.split(b"\n"), 1):
        origin = f"{path}, line {number}"
        if line.strip():
            yield Record.parse(line, origin, "take the line from a copy of the file, such as git's"), origin


def learning_curves(records: Iterable[Record]) -> pd.DataFrame:
    """Validation accuracy by epoch, a column a seed.

    A seed that ended before the others keeps its last value, so that a mean is always one over the same seeds; the
    epoch in which it diverged does not count.
    """
    curves = {
        r.seed: {e["epoch"]: e["val/accuracy"] for e in r.epochs if e["epoch"] != r.diverged_epoch} for r in records
    }
    return pd.DataFrame(curves, dtype=float).sort_index().ffill()


def table(records: Iterable[Record]) -> pd.DataFrame:
    """One row per run and seed: what was run, where, and what it reached; each setting is a column `config.<key>`."""
    rows = [
        {"name": r.name, "signature": r.signature, "seed": r.seed, "test": r.test or {}, "best": r.best}
        | {"epochs": len(r.epochs)}
        | r.model_dump(exclude={"format", "name", "signature", "seed", "test", "epochs"})
        for r in records
    ]
    if not rows:
        return pd.DataFrame()
    # Lists become text, so that every column can be compared and written.
    frame = pd.json_normalize(rows).map(lambda value: str(value) if isinstance(value, list) else value)
    return frame.sort_values(["name", "signature", "seed"], ignore_index=True)


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Writes a table as the ending of the path says. Raises Mistake for another than .csv or .parquet."""
    if path.suffix not in (".csv", ".parquet"):
        raise Mistake(f"{path}: a table is written as .csv or .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False, lineterminator="\n")
    else:
        mixed = {name: "string" for name in frame if frame[name].dtype == object}
        frame.astype(mixed).to_parquet(path, index=False)
