"""Logs of a run for people to look at, one for each seed: W&B, TensorBoard, CSV. The records are the truth.

All logs get the same numbers under the same names: each epoch as in the record, then the final figures, and the config
as hyper-parameters. Weights & Biases has a module of its own, so that only runs that log there import it.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from nobackprop.mistakes import Mistake
from nobackprop.training.learner import Learner


class SeedLog(Logger):
    """The log of one seed: a Lightning logger that also takes the final figures. The one who opened it closes it."""

    @abstractmethod
    def result(self, figures: Mapping[str, float], step: int) -> None:
        """Takes the final figures, which were reached after so many mini-batches."""

    @abstractmethod
    def close(self, failed: bool) -> None:
        """Writes what is left. Lightning finalizes a logger after the epochs, but the final figures come later."""


class Logging(ABC):
    """conf/logger: how the seeds of a run are logged."""

    @abstractmethod
    def open(self, folder: Path, seed: int, config: dict[str, Any]) -> SeedLog:
        """The log of a seed of the run in `folder`. `config` has all settings of the run, and is not changed."""


class EpochLog(Callback):
    """Gives each seed's log that seed's epochs, one entry for each. The log's steps count mini-batches.

    A resumed run gives the epochs before the interruption again. A log in files has been made anew by then, and an
    online run of W&B ignores what it has already.
    """

    def __init__(self) -> None:
        self.given: dict[int, int] = {}  # how many epochs of each seed were given

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        for i, (log, p) in enumerate(zip(trainer.loggers, pl_module.progress, strict=bool(trainer.loggers))):
            for epoch in p.epochs[self.given.get(i, 0) :]:
                known = {name: value for name, value in epoch.items() if value is not None}  # no number: it diverged
                log.log_metrics({**known, "trainer/global_step": epoch["step"]}, step=int(epoch["step"]))
            self.given[i] = len(p.epochs)

    on_train_epoch_end = on_fit_end = on_train_start  # the last epoch, where nothing was left to train


def without_machine(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's settings without those that name places on this machine."""
    source = {key: value for key, value in config["dataset"]["source"].items() if key not in ("root", "cache")}
    kept = {key: value for key, value in config.items() if key not in ("paths", "launcher")}
    return kept | {"dataset": config["dataset"] | {"source": source}}


def _emptied(folder: Path, seed: int, name: str) -> dict[str, Any]:
    """The arguments by which Lightning writes a log into `seed<k>/name`. What was there is removed."""
    seed_folder = folder / f"seed{seed}"
    if (old := seed_folder / name).exists():
        shutil.rmtree(old)
    return {"save_dir": seed_folder, "name": "", "version": name}


@dataclass(frozen=True)
class CSV(Logging):
    """Writes `csv/metrics.csv` and `csv/hparams.yaml` for each seed, by Lightning's CSVLogger.

    The table has a line for each epoch and a last one for the final figures. A resumed run writes both files anew, from
    the first epoch on.
    """

    def open(self, folder: Path, seed: int, config: dict[str, Any]) -> SeedLog:
        log = _CSVLog(**_emptied(folder, seed, "csv"), flush_logs_every_n_steps=1)
        log.log_hyperparams({**without_machine(config), "seed": seed})
        return log


class _CSVLog(CSVLogger, SeedLog):
    def result(self, figures: Mapping[str, float], step: int) -> None:
        self.log_metrics(dict(figures), step)

    def close(self, failed: bool) -> None:
        self.save()


@dataclass(frozen=True)
class TensorBoard(Logging):
    """Writes `tensorboard/` for each seed, by Lightning's TensorBoardLogger. `tensorboard --logdir runs` shows it.

    A resumed run writes it anew, from the first epoch on, so the epochs before the interruption have the time of day at
    which the run was resumed. A seed appears in TensorBoard's table of hyper-parameters when it has final figures.
    Until then its config is in `tensorboard/hparams.yaml`. Raises Mistake where tensorboard is not installed.
    """

    def __post_init__(self) -> None:
        if find_spec("tensorboard") is None:
            raise Mistake("logger=tensorboard needs a package that is not here: pip install tensorboard; or logger=csv")

    def open(self, folder: Path, seed: int, config: dict[str, Any]) -> SeedLog:
        log = _TensorBoardLog(**_emptied(folder, seed, "tensorboard"), default_hp_metric=False)
        log.log_hyperparams({**without_machine(config), "seed": seed})
        _ = log.experiment  # makes the folder, where save() leaves the config
        log.save()
        return log


class _TensorBoardLog(TensorBoardLogger, SeedLog):
    def result(self, figures: Mapping[str, float], step: int) -> None:
        self.log_hyperparams(self.hparams, dict(figures), step)

    def finalize(self, status: str) -> None:
        self.save()  # Lightning's closes the file, and the final figures would open another one

    def close(self, failed: bool) -> None:
        self.experiment.close()
