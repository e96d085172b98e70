"""Checkpoint files: written whole, checked when read, the last two kept."""

import io
import json
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from nobackprop.mistakes import Mistake
from nobackprop.records import write_atomically

KEPT = 2  # the last one, and the one before it in case the last one is damaged


class CheckpointFolder(TorchCheckpointIO):
    """Lightning's reader and writer, for a folder. A file's name is its step and the checksum of its content."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint into the folder `path`, atomically, and then removes all but the last two."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getvalue()
        folder = Path(path)
        write_atomically(folder / f"{checkpoint['steps']:09d}-{_checksum(content)}.ckpt", content)
        for old in sorted(folder.glob("*.ckpt"))[:-KEPT]:
            old.unlink()


def newest(folder: Path) -> Path | None:
    """The last checkpoint in a folder whose content fits its checksum; None where there is none.

    Warns of one that is damaged, and puts it aside as `.damaged`.
    """
    for path in sorted(folder.glob("*.ckpt"), reverse=True):
        if path.stem == f"{step(path):09d}-{_checksum(path.read_bytes())}":
            return path
        damaged = path.replace(path.with_suffix(".damaged"))
        warnings.warn(f"checkpoint {damaged} is damaged: the run goes on from the one before it", stacklevel=2)
    return None


def seeds(path: Path) -> list[int]:
    """The seeds that a checkpoint is of. Raises Mistake where it is damaged."""
    if path.stem.rpartition("-")[2] != _checksum(path.read_bytes()):
        raise Mistake(f"{path} is damaged (it does not fit its checksum)")
    try:
        return json.loads(path.with_name("about.json").read_text())["seeds"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Mistake(f"{path} does not say whose it is") from None


def step(path: Path) -> int:
    """How many mini-batches had been trained when this checkpoint was written."""
    return int(path.stem.split("-")[0])


def _checksum(content: bytes) -> str:
    return sha256(content).hexdigest()[:16]
