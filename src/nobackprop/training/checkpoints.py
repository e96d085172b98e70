"""Checkpoint files: written whole, checked when read, the last two kept. Each says whose it is."""

import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from nobackprop.mistakes import Mistake, Notice
from nobackprop.records.identity import digest
from nobackprop.training import sealed
from nobackprop.training.stopping import StopSignals

KEPT = 2  # the last one, and the one before it in case the last one is damaged


class About(BaseModel):
    """Whose a checkpoint is. It is kept inside, and compared before the checkpoint is used."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    run: str  # the name of the run's folder, which holds its signature
    seeds: list[int]
    fingerprint: str  # of the images
    commits: list[str]  # of the code that has trained it, in order

    def __str__(self) -> str:
        return f"seed {','.join(map(str, self.seeds))} of {self.run} on images of fingerprint {self.fingerprint}"

    def fits(self, other: "About") -> bool:
        """Whether both are of one run, of the same seeds and images; the code may be another."""
        return self.model_copy(update={"commits": other.commits}) == other

    def folder(self, run: Path) -> Path:
        """Where these seeds' checkpoints are, in the run's folder."""
        return run / "checkpoints" / f"{digest({'seeds': self.seeds})}_{self.fingerprint}"


class CheckpointFolder(TorchCheckpointIO):
    """Lightning's reader and writer, for a folder. A file's name is its step."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes a checkpoint into the folder `path`, atomically, and then removes all but the last two.

        Warns where it can't be written: training can go on.
        """
        file = Path(path) / f"{checkpoint['steps']:09d}.ckpt"
        try:
            sealed.write(file, checkpoint)
            for old in files(file.parent)[:-KEPT]:
                old.unlink()
        except OSError as e:
            warnings.warn(
                f"checkpoint {file} could not be written ({e.strerror or e}): training goes on; if it is interrupted, "
                "the same command goes on from the checkpoint before this one",
                Notice,
                stacklevel=2,
            )


def files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the last one last."""
    return sorted((path for path in folder.glob("*.ckpt") if path.stem.isdecimal()), key=step)


def step(path: Path) -> int:
    """How many mini-batches had been trained when this checkpoint was written."""
    return int(path.stem)


def about(path: Path) -> About:
    """Whose a checkpoint is. Raises Mistake where it is damaged, or another version's."""
    return _about(path, sealed.read(path))


def _about(path: Path, content: Any) -> About:
    try:
        return About.model_validate(content["about"] if isinstance(content, dict) else None)
    except (KeyError, ValidationError):
        raise Mistake(f"{path} was written by another version of nobackprop") from None


def usable(folder: Path, about: About) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The checkpoints in a folder that are whole and of this run, seeds and images, and what they hold; the last first.

    Warns of any others on the way, and puts them aside.
    """
    for path in sorted({*folder.glob("*.ckpt")} - {*files(folder)}):
        put_aside(path, f"{path} was not written by this version of nobackprop")
    for path in reversed(files(folder)):
        try:
            content = sealed.read(path)
            other = _about(path, content)
        except Mistake as e:
            put_aside(path, str(e))
        except OSError as e:
            put_aside(path, f"{path} can't be read ({e.strerror})")
        else:
            if not other.fits(about):
                put_aside(path, f"{path} is of {other}, not of {about}")
            elif content.get("steps") != step(path):
                put_aside(path, f"{path} has another name than it was given")
            else:
                yield path, content


def put_aside(path: Path, what: str) -> None:
    """Gives a checkpoint that can't be used another name, so that it is out of the way, and warns of it."""
    aside = path.with_suffix(".unused")
    with suppress(OSError):
        path.replace(aside)
    warnings.warn(
        f"checkpoint {what}: it is not used, but kept as {aside.name} until these seeds are recorded",
        Notice,
        stacklevel=3,
    )


def interrupted(run: Path) -> Iterator[tuple[Path, About]]:
    """The last checkpoint of each group of seeds in a run's folder, and whose it is; not checked, which takes time."""
    for folder in sorted(run.glob("checkpoints/*")):
        for path in reversed(files(folder)):
            if (about := _peek(path)) and about.run == run.name and about.folder(run) == folder:
                yield path, about
                break


def _peek(path: Path) -> About | None:
    """Whose a checkpoint is, without reading its tensors; None where it does not say."""
    try:
        return About.model_validate(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["about"])
    except Exception:  # torch.load raises what damage leads to; who uses the checkpoint is told
        return None


def remove(folder: Path) -> None:
    """Removes the checkpoints of a group of seeds."""
    rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # there are others
        folder.parent.rmdir()


class ResumePoint(Checkpoint):
    """Writes, at most every `minutes` and when asked to stop, the checkpoint that an interrupted run goes on from.

    It says whose it is: `about`. Lightning's ModelCheckpoint knows no time interval under manual optimization (2.6).
    """

    def __init__(self, folder: Path, about: About, minutes: float, signals: StopSignals) -> None:
        self.folder, self.about, self.interval_s, self.signals = folder, about, 60 * minutes, signals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved = time.monotonic()
        self.signals.listen()  # Lightning has taken SIGTERM

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.is_last_batch:  # that one waits for its epoch's validation
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["about"] = self.about.model_dump()

    def save(self, trainer: Trainer) -> None:
        due = self.signals.due or time.monotonic() - self.saved >= self.interval_s
        # Of several processes the first decides for all, since they write, and stop, together or not at all.
        due, self.signals.signum = trainer.strategy.broadcast((due, self.signals.signum))
        if due:
            trainer.save_checkpoint(self.folder, weights_only=False)
            self.saved = time.monotonic()
        self.signals.check()
