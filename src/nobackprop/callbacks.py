"""What accompanies training: the progress bar and Weights & Biases."""

import logging
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import WandbLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class ProgressBar(Callback):
    """One bar for the whole fit: what is trained, epochs done, validation accuracy, samples/s, time left."""

    def __init__(self, title: str, console: Console) -> None:
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs{task.fields[scores]}"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        self.task = self.bar.add_task(title, total=None, scores="")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.update(self.task, total=trainer.max_epochs, completed=trainer.current_epoch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        last = [p.epochs[-1] for p in pl_module.progress if p.epochs]
        accuracy = sum(e["val/accuracy"] for e in last) / len(last)
        self.bar.update(self.task, advance=1, scores=f"  validation {accuracy:.1%}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.bar.stop()


def wandb_logger(
    project: str, *, mode: str, entity: str | None, group: str, tags: list[str], name: str, folder: str, config: dict[str, Any]
) -> WandbLogger:
    """A Weights & Biases run of its own for one seed, through Lightning's logger; finish it with `experiment.finish()`."""
    import wandb

    logging.getLogger("wandb").setLevel(logging.ERROR)
    Path(folder).mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=project,
        entity=entity,
        mode=mode,
        group=group,
        tags=tags,
        name=name,
        dir=folder,
        config=config,
        settings=wandb.Settings(reinit="create_new", silent=True, console="off"),
    )
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step")
    return WandbLogger(experiment=run)
