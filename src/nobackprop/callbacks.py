"""What accompanies training: the progress bar and Weights & Biases."""

import logging
import time
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import WandbLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from nobackprop.batches import TrainBatches
from nobackprop.learner import Learner
from nobackprop.stopping import StopSignals


class ProgressBar(Callback):
    """One bar for the whole fit, in mini-batches: what is trained, epochs, validation accuracy, speed, time left."""

    def __init__(self, title: str, console: Console) -> None:
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        self.task = self.bar.add_task(title, total=None, state="")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.train_dataloader
        assert isinstance(pl_module, Learner)
        assert isinstance(batches, TrainBatches)
        total = batches.per_epoch * (trainer.max_epochs or 0)
        self.bar.start()
        self.bar.update(self.task, total=min(total, batches.max_steps or total), completed=pl_module.steps)
        self.images = batches.batch_size * len(pl_module.seeds)
        self.first, self.started = pl_module.steps, time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Learner)
        speed = (pl_module.steps - self.first) * self.images / (time.monotonic() - self.started)
        state = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {speed:,.0f} images/s"
        if last := [p.epochs[-1] for p in pl_module.progress if p.epochs]:
            state += f"  validation {sum(e['val/accuracy'] for e in last) / len(last):.1%}"
        self.bar.update(self.task, completed=pl_module.steps, state=state)

    on_train_epoch_end = on_train_batch_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.bar.stop()


class ResumePoint(Checkpoint):
    """Writes, at most every `minutes` and when asked to stop, the checkpoint that an interrupted run goes on from.

    Lightning's ModelCheckpoint knows no time interval under manual optimization (2.6).
    """

    def __init__(self, folder: Path, minutes: float, signals: StopSignals) -> None:
        self.folder, self.interval_s, self.signals = folder, 60 * minutes, signals

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved = time.monotonic()
        self.signals.listen()  # Lightning has taken SIGTERM

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer.is_last_batch:  # that one waits for its epoch's validation
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        if self.signals.due or time.monotonic() - self.saved >= self.interval_s:
            trainer.save_checkpoint(self.folder, weights_only=False)
            self.saved = time.monotonic()
        self.signals.check()


def wandb_logger(
    folder: Path,
    seed: int,
    config: dict[str, Any],
    *,
    project: str,
    mode: Literal["online", "offline", "disabled"],
    entity: str | None,
    group: str | None,
    tags: list[str],
) -> WandbLogger:
    """A Weights & Biases run of its own for one seed of the run in `folder`; finish it with `experiment.finish()`."""
    import wandb

    logging.getLogger("wandb").setLevel(logging.ERROR)
    seed_folder = folder / f"seed{seed}"
    seed_folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=project,
        entity=entity,
        mode=mode,
        group=group or folder.name,
        tags=tags,
        name=f"{folder.name} seed {seed}",
        dir=seed_folder,
        config={**config, "seed": seed},
        settings=wandb.Settings(reinit="create_new", silent=True, console="off"),
    )
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step")
    return WandbLogger(experiment=run)
