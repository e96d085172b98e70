"""Files of tensors that end with a checksum of all that comes before it; plain `torch.load` reads them too.

torch writes a zip file, whose own checksums leave out headers and padding. Ours is the zip file's comment.
"""

import io
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch

from nobackprop.mistakes import Mistake
from nobackprop.records.files import write_atomically

NAME = b"sha256:"
SIZE = len(NAME) + 2 * sha256().digest_size  # bytes of the comment
END = 22  # bytes of a zip file's last part, which ends with the length of the comment


class Damaged(Mistake):
    """A file is not what was written. The message names the file and how this shows."""


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes tensors and plain data, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(-2, io.SEEK_END)
    buffer.write(SIZE.to_bytes(2, "little"))
    buffer.write(_checksum(buffer.getbuffer()))
    write_atomically(path, buffer.getvalue())


def read(path: Path) -> Any:
    """What was written, on the CPU. Nothing in the file is run or unpickled. Raises Damaged.

    Of a file from before there were checksums, only the tensors are checked.
    """
    content = path.read_bytes()
    if not _fits(content):
        raise Damaged(f"{path} is damaged (it does not fit its checksum)")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises what the content leads to
        raise Damaged(f"{path} is damaged (torch can't load it: {type(e).__name__})") from e


def _fits(content: bytes) -> bool:
    last = content[-END:]
    if last.startswith(b"PK\5\6") and last.endswith(b"\0\0"):  # no comment: from before there were checksums
        try:
            return ZipFile(io.BytesIO(content)).testzip() is None
        except Exception:  # zipfile raises what the damage leads to
            return False
    view = memoryview(content)
    return view[-SIZE:] == _checksum(view[:-SIZE])


def _checksum(content: memoryview) -> bytes:
    return NAME + sha256(content).hexdigest().encode()
