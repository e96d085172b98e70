"""The files that images are read from: they must be regular, and the same as at the first reading. Also locks."""

import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path

from filelock import FileLock, Timeout

from nobackprop.mistakes import Missing, Mistake
from nobackprop.records.files import user_cache, write_atomically

logger = logging.getLogger(__name__)

WAIT_S = 5.0  # of waiting for a lock, before the user is told


def as_folder(path: str | Path) -> Path:
    """A folder, which may not exist yet, with `~` as a user's home. Raises Mistake where a file is in its place."""
    try:
        found = Path(path).expanduser()
    except RuntimeError as e:
        raise Mistake(f"the folder {path} can't be found: {e} Write the whole path.") from None
    if found.exists() and not found.is_dir():
        raise Mistake(f"{found} is a file, but must be a folder: choose another path, or move the file")
    return found


def digest(path: Path, algorithm: str = "sha256") -> str:
    """The checksum of a file. Raises Mistake for a file that is not regular: reading a pipe would never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise Mistake(f"{path} is not a regular file: put the file itself there")
    with path.open("rb") as file:
        return file_digest(file, algorithm).hexdigest()


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns an error of the system, such as a missing permission, into a Mistake that names the path."""
    try:
        yield
    except Missing:
        raise
    except OSError as e:
        told = f"{e.filename}: {e.strerror}" if e.filename else e
        raise Mistake(
            f"{name}: while its images were read, the system refused {told}. Correct the path, its permissions, or "
            "what is there."
        ) from e


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Holds the lock of a file. If another process has it, tells the user what is waited for (`doing`)."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=WAIT_S)
    except Timeout:
        logger.warning(
            f"waiting for another process that is {doing}: it holds the lock {path}, and gives it up when it ends. "
            "If no process is at work there, on any machine, the lock is stale: delete that file."
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Sums:
    """The sha256 sums of files, by their names in a folder. Those of now are compared with those of the first reading.

    They are kept in `<name>.sha256` in that folder, in the format of the command sha256sum. Where that folder is
    read-only they are kept in the user's cache.
    """

    def __init__(self, name: str, where: Path, files: Mapping[str, Path]) -> None:
        self.name, self.where = name, where
        # A line break in a name is written as sha256sum writes it.
        self._now = {os.fsencode(file).replace(b"\n", b"\\n"): digest(path).encode() for file, path in files.items()}

    def known(self, remedy: str) -> bool:
        """Whether the files were read before. Raises Mistake where their names or their content have changed since."""
        for path in self._places():
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):  # another user may have written it
                then = {line[66:]: line[:64] for line in path.read_bytes().split(b"\n") if line}
                break
        else:
            return False
        if then == self._now:
            return True
        faults = {
            "changed": {file for file in then.keys() & self._now if then[file] != self._now[file]},
            "missing": then.keys() - self._now,
            "new": self._now.keys() - then,
        }
        told = "; ".join(f"{kind}: {some(map(os.fsdecode, files))}" for kind, files in faults.items() if files)
        raise Mistake(
            f"{self.name}: the files in {self.where} are not those that were read first ({told}). {remedy} "
            f"If the change is meant, delete {path}, which has the checksums of then."
        )

    def keep(self) -> Path | None:
        """Keeps the sums for later readings. Gives the path, or None where nothing can be written."""
        content = b"".join(b"%s  %s\n" % (number, file) for file, number in sorted(self._now.items()))
        for path in self._places():
            # Root could write to a read-only folder, too. A folder that does not exist is not made.
            if path.parent == self.where and not (path.parent.is_dir() and path.parent.stat().st_mode & 0o222):
                continue
            try:
                write_atomically(path, content)
            except OSError:
                continue
            return path
        return None

    def _places(self) -> Iterator[Path]:
        name = self.name.replace("/", "_")
        yield self.where / f"{name}.sha256"
        key = sha256(os.fsencode(self.where.resolve())).hexdigest()[:12]
        with suppress(RuntimeError):  # a user without a home
            yield user_cache() / f"{name}-{key}.sha256"


def some(names: Iterable[str]) -> str:
    """Names in order as a list, and of many the first five. In a list one sees where each name ends."""
    shown = sorted(names)
    return str(shown) if len(shown) <= 5 else f"{str(shown[:5])[:-1]}, ... {len(shown)} in all]"
