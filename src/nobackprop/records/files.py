"""Files that are written whole or not at all, even by a process that is killed, and their checksums.

No library at hand also syncs the file's new name to the disk, without which a power cut may lose it. Nor does any name
an unfinished file after the process that left it behind, and its thread.
"""

import os
import platform
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from threading import get_native_id


def user_cache() -> Path:
    """Where this program keeps, for a user, what it can make again. Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nobackprop"


def checksum(content: bytes) -> str:
    """Sixteen hexadecimal digits of a hash, which damage changes."""
    return sha256(content).hexdigest()[:16]


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it is either whole or absent, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{get_native_id()}.{platform.node()}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # syncs the new name, too
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)  # it is there only if something went wrong, such as a full disk


def remove_unfinished(folder: Path, alone: bool = False) -> None:
    """Removes what `write_atomically` left in a folder when its process was killed.

    Whether a process was killed is known only on its own machine. What processes of other machines have left is removed
    after a day. `alone` says that nobody can be writing there, so that everything is removed.
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
