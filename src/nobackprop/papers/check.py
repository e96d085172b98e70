"""Checks all that is kept of runs: records, files of records, weights and checkpoints, below any folders.

    python scripts/check.py runs results

It lists files that are damaged, and says what to do about them. It lists files that are orphaned, such as the
unfinished file of a process that was killed, or a checkpoint of seeds that are recorded. It lists files that are
unchecked, since they are from before there were checksums, and files that no run wrote. `--add-checksums` makes
checksums for files of lines that have none yet. From then on, a change of their lines is noticed. Nothing else is
changed. The exit status is 1 if anything is damaged.
"""

import argparse
import fcntl
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nobackprop.mistakes import Missing, Mistake, Unknown
from nobackprop.records.gathering import START, add_checksums, checksums_of, read_lines
from nobackprop.records.literal import plain
from nobackprop.records.record import SEALED, Record

Kind = Literal["damaged", "orphaned", "unchecked", "foreign"]
RUN, SEED = re.compile(r".+-[0-9a-f]{12}"), re.compile(r"seed(\d+)")
UNFINISHED = re.compile(r"\..+\.\d+")  # write_atomically names a file after its process
OURS = re.compile(
    r"about\.json|\.lock|\.holder|(error|job)_[0-9a-f]{12}\.txt|learning_curves\.png|(config|multirun|optimization_results)\.yaml"
)
OTHERS = {"wandb", "tensorboard", "csv", ".submitit"}  # folders of other programs within ours


@dataclass
class Checked:
    """What was found: the number of whole files of each kind, and sentences on what is wrong."""

    whole: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[Kind, str]] = field(default_factory=list)
    unchecked: list[Path] = field(default_factory=list)  # files of lines, some of which have no checksum

    def add(self, kind: Kind, text: str) -> None:
        self.problems.append((kind, text))

    def __str__(self) -> str:
        whole = ", ".join(f"{count} {what}" for what, count in self.whole.items()) or "nothing"
        kinds = Counter(kind for kind, _ in self.problems)
        return f"whole: {whole}" + "".join(f"; {kind}: {count}" for kind, count in kinds.items())


def check(folders: Iterable[Path]) -> Checked:
    """Checks all files below these folders. Raises Missing for one that is not there."""
    found, foreign = Checked(), defaultdict(list)
    for top in folders:
        if not top.is_dir():
            raise Missing(f"{top} is no folder: give folders of runs or of files of records")
        for folder, files in _walk(top, found):
            if SEED.fullmatch(folder.name) and RUN.fullmatch(folder.parent.name):
                _check_seed(folder, found)
            for path in files:
                try:
                    if not _check_file(path, found):
                        foreign[folder].append(path.name)
                except OSError as e:
                    found.add("damaged", f"{path} can't be read ({e.strerror}): mend its permissions, or the disk")
    for folder, names in foreign.items():
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        found.add("foreign", f"{folder} holds {len(names)} files that no run wrote: {shown}")
    return found


def _walk(top: Path, found: Checked) -> Iterator[tuple[Path, list[Path]]]:
    """The folders below and their files. Notes those that are empty or can't be read."""

    def unreadable(e: OSError) -> None:
        found.add("damaged", f"{e.filename} can't be read ({e.strerror}): mend its permissions, or the disk")

    for folder, within, files in os.walk(top.absolute(), onerror=unreadable):
        if not within and not files and Path(folder) != top.absolute() and not folder.endswith("checkpoints"):
            found.add("orphaned", f"{folder} is empty: delete it")
        within[:] = sorted(set(within) - OTHERS)
        yield Path(folder), [Path(folder, name) for name in sorted(files)]


def _check_seed(folder: Path, found: Checked) -> None:
    """Checks what is in a seed's folder, and what is missing there."""
    record, net = folder / "record.json", folder / "best.pt"
    if record.exists() or _is_trained(folder):
        return
    if net.exists():
        found.add("orphaned", f"{net} has no record: the run's command trains this seed again, or delete the folder")
    elif not list(folder.parent.glob("checkpoints/*/*.ckpt")):
        found.add("orphaned", f"{folder} has neither a record nor a checkpoint: the run's command starts it again")


def _check_file(path: Path, found: Checked) -> bool:
    """Whether a file is of a kind that this program writes."""
    if path.name == "record.json":
        _check_record(path, found)
    elif path.name == "best.pt":
        _check_net(path, found)
    elif path.suffix == ".ckpt" and path.parent.parent.name == "checkpoints":
        _check_checkpoint(path, found)
    elif path.suffix == ".jsonl":
        return _check_lines(path, found)
    elif path.suffix == ".checksums" and path.stem.endswith(".jsonl"):
        if not path.with_suffix("").exists():
            found.add("orphaned", f"{path} is of a file that is not there: take {path.stem} from a copy, or delete it")
    elif path.suffix in (".damaged", ".unused"):
        found.add("orphaned", f"{path} is a checkpoint that could not be used: delete it")
    elif UNFINISHED.fullmatch(path.name):
        if not any(map(_is_trained, (path.parent, *path.parent.parent.parent.glob("seed*")))):
            found.add("orphaned", f"{path} was not written to its end when its process was killed: delete it")
    else:
        return bool(OURS.fullmatch(path.name))
    return True


def _check_record(path: Path, found: Checked) -> None:
    try:
        record = Record.read(path)
    except Mistake as e:
        found.add("damaged", str(e))
        return
    found.whole["records"] += 1
    if not SEALED.match(path.read_bytes()):
        found.whole["of these without a checksum"] += 1
    if path.parent.parent.name != record.run or path.parent.name != f"seed{record.seed}":
        found.add("orphaned", f"{path} is the record of seed {record.seed} of {record.run}: move it to its folder")
    elif record.best_epoch and not path.with_name("best.pt").exists():
        found.add("orphaned", f"{path} has no weights beside it (best.pt): delete it to train this seed again")


def _check_net(path: Path, found: Checked) -> None:
    from nobackprop.training import saved  # here, since torch takes seconds to import, and files of lines don't need it

    try:
        saved.load(path)
        found.whole["trained nets"] += 1
    except Unknown as e:
        found.add("unchecked", str(e))
    except Mistake as e:
        found.add("damaged", str(e))


def _check_checkpoint(path: Path, found: Checked) -> None:
    from nobackprop.training import checkpoints

    run = path.parent.parent.parent
    try:
        about = checkpoints.about(path)
    except FileNotFoundError:  # its training has gone on, or is over
        return
    except Mistake as e:
        found.add("damaged", f"{e}: delete it; the run's command goes on from the one before it, if there is one")
        return
    found.whole["checkpoints"] += 1
    if all((run / f"seed{seed}" / "record.json").exists() for seed in about.seeds):
        found.add("orphaned", f"{path} is of seeds that are recorded: delete {path.parent}")


def _check_lines(path: Path, found: Checked) -> bool:
    """Whether a file of lines holds records, or held some."""
    with path.open("rb") as file:
        lines = [(line.startswith(START), bool(SEALED.match(line))) for line in file]
    if not any(ours for ours, _ in lines) and not checksums_of(path).exists():
        return False
    try:
        for _ in read_lines(path):
            found.whole["lines of records"] += 1
    except Mistake as e:
        found.add("damaged", str(e))
        return True
    old = sum(ours and not sealed for ours, sealed in lines)
    if old and not checksums_of(path).exists():
        found.unchecked.append(path)
        found.add("unchecked", f"{path} has {old} lines without a checksum: --add-checksums makes them")
    return True


def _is_trained(folder: Path) -> bool:
    """Whether a process holds the lock of a seed's folder."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # it does not exist, or nobody can hold it
        pass
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--add-checksums", action="store_true", help="make those that files of lines lack")
    options = parser.parse_args()
    try:
        found = check(options.folders)
        for kind, text in found.problems:
            print(plain(f"{kind}: {text}"))
        for path in found.unchecked if options.add_checksums else ():
            print(plain(f"{checksums_of(path)}: {add_checksums(path)} checksums"))
    except (Mistake, OSError) as e:
        parser.exit(1, f"{parser.prog}: {e}\n")
    print(found)
    parser.exit(1 if any(kind == "damaged" for kind, _ in found.problems) else 0)
