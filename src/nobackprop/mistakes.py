"""Mistakes of the user, which are told in a sentence. Any other exception is a program's fault, with a traceback."""

import errno
import os
import re
import sys
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any


class Mistake(ValueError):
    """The user gave something that can't work. The message says what was given, what is allowed and what to do."""


class Missing(Mistake, FileNotFoundError):
    """A file or folder that is needed is not there. The message says which, and how to get it."""


class Unknown(Mistake):
    """What a file was made with is not in nobackprop, and not imported. The file may be whole."""


class Notice(UserWarning):
    """Something happens that the user may not expect, and the work goes on. The message is a sentence for the user."""


def close(name: str, names: Iterable[str]) -> str:
    """`. Did you mean ...?` with the names that are most like this one; empty where none is."""
    plain = {_plain(other): other for other in names}
    wanted = _plain(name)
    same, starting = [t for t in plain if t == wanted], [t for t in plain if t.startswith(wanted)]
    holding = [t for t in plain if wanted in t]
    found = (same or starting or get_close_matches(wanted, plain, 1) or holding)[:3]
    return f". Did you mean {' or '.join(plain[text] for text in found)}?" if found else ""


def _plain(name: str) -> str:
    return re.sub(r"[-_.\s]", "", name).lower()


def faults(validation: Any, unnamed: Container[object] = ()) -> list[str]:
    """What a ValidationError of pydantic's says, each fault after its place, whose `unnamed` parts are left out."""
    found = []
    for error in validation.errors():
        where = ".".join(str(part) for part in error["loc"] if part not in unnamed)
        text = error["msg"].removeprefix("Value error, ")
        found.append(f"{where}: {text}" if where else text)
    return found


@contextmanager
def at(where: str) -> Iterator[None]:
    """Within, the message of a Mistake begins with its place."""
    try:
        yield
    except Mistake as e:
        raise Mistake(f"{where}: {e}") from e


@contextmanager
def answering(name: str) -> Iterator[None]:
    """Ends a script of that name with a sentence and status 1, for a mistake or a file that can't be used.

    Any other error is a program's fault and keeps its traceback. Ctrl-C gives status 130.
    """
    try:
        yield
    except Mistake as e:
        sys.exit(f"{name}: {e}")
    except OSError as e:
        if e.filename is None:
            raise
        sys.exit(f"{name}: {e.filename}: {e.strerror}")
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: interrupted; the same command goes on\n")
        sys.exit(130)


# What to do about an error of the system, by its number; {key} is paths.runs or paths.data.
ROOM = "make room; the same command goes on, from the last checkpoint if there is one"
ELSEWHERE = "use another folder, {key}=..."
IN_THE_WAY = f"a file is where a folder should be: move it away, or {ELSEWHERE}"
REMEDIES = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EROFS: ELSEWHERE,
    errno.EACCES: f"change its permissions, or {ELSEWHERE}",
    errno.EPERM: f"change its permissions, or {ELSEWHERE}",
    errno.ENOLCK: f"{ELSEWHERE} on a file system that has locks",
    errno.ENOTDIR: IN_THE_WAY,
    errno.EEXIST: IN_THE_WAY,
    errno.EISDIR: "a folder is where a file should be: move it away",
    errno.ENAMETOOLONG: ELSEWHERE,
}

UNNAMED = {errno.ENOSPC, errno.EDQUOT, errno.ENOLCK}  # these come from a file that is open, so without its name
KEPT = {"runs": "records, weights and checkpoints", "data": "images"}


@contextmanager
def about_files(cfg: Any) -> Iterator[None]:
    """Within, an error of the system about a file under a config's paths.runs or paths.data becomes a Mistake."""
    try:
        yield
    except OSError as e:
        remedy = REMEDIES.get(e.errno or 0)
        if isinstance(e, Mistake) or remedy is None:
            raise
        for name, kept in KEPT.items():
            folder = Path(str(cfg.paths[name])).expanduser().absolute()
            path = folder if e.filename is None and e.errno in UNNAMED else Path(str(e.filename)).absolute()
            if path.is_relative_to(folder) or folder.is_relative_to(path):  # its parents are made with it
                told = f"{path} can't be used for {kept}: {e.strerror}"
                raise Mistake(f"{told}; {remedy.format(key=f'paths.{name}')}") from e
        raise


def check_writable(folder: Path) -> None:
    """Raises OSError where a folder can't be made or written to."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    number = 0 if nearest.is_dir() else errno.ENOTDIR
    if not number and not os.access(nearest, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(nearest).f_flag & os.ST_RDONLY else errno.EACCES
    if not number and not folder.is_dir():
        try:
            TemporaryFile(dir=nearest).close()
        except FileNotFoundError:  # in a file system of the kernel's, such as /proc
            number = errno.EROFS
    if number:
        raise OSError(number, os.strerror(number), str(nearest))
