"""What training shows: lines and bars."""

import time
from functools import partial
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from nobackprop.data.batches import TrainBatches
from nobackprop.training.learner import Learner


class Screen:
    """What a run shows on a console: lines, and a bar for each title that is training, in mini-batches.

    It is drawn when there is something new. It has no thread of its own, which would take turns with the training.
    """

    def __init__(self, console: Console) -> None:
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Screen":
        self.bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bars.stop()

    def print(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def bar(self, title: str, **fields: Any) -> None:
        """Draws a bar, which may be new: its `total`, how much is `completed`, and its `state` in words."""
        if title not in self.tasks:
            self.tasks[title] = self.bars.add_task(title, total=None, state="")
        self.bars.update(self.tasks[title], refresh=True, **fields)

    def finish(self, title: str) -> None:
        """Leaves a bar as a line above those that go on."""
        if (number := self.tasks.pop(title, None)) is not None:
            (task,) = (t for t in self.bars.tasks if t.id == number)
            if self.bars.console.is_terminal:
                self.bars.console.print(self.bars.make_tasks_table([task]))
            else:  # a file has no width
                self.print(f"{task.description} {task.fields['state']}")
            self.bars.remove_task(number)


class ProgressBar(Callback):
    """Draws one bar for the whole fit, with what is trained, epochs, validation accuracy, speed and time left."""

    INTERVAL_S = 0.25

    def __init__(self, title: str, screen: Screen) -> None:
        self.draw = partial(screen.bar, title)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.train_dataloader
        assert isinstance(pl_module, Learner)
        assert isinstance(batches, TrainBatches)
        total = batches.per_epoch * (trainer.max_epochs or 0)
        self.draw(total=min(total, batches.max_steps or total), completed=pl_module.steps)
        self.images = batches.batch_size * len(pl_module.seeds)
        self.first, self.started = pl_module.steps, time.monotonic()
        self.drawn = self.started

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if time.monotonic() - self.drawn >= self.INTERVAL_S:
            self.show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.show(trainer, pl_module)

    def show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        self.drawn = time.monotonic()
        speed = (pl_module.steps - self.first) * self.images / (self.drawn - self.started)
        epoch = min(trainer.current_epoch + 1, trainer.max_epochs or 1)
        state = f"epoch {epoch}/{trainer.max_epochs}  {speed:,.0f} images/s"
        if last := [p.epochs[-1] for p in pl_module.progress if p.epochs]:
            state += f"  validation {sum(e['val/accuracy'] for e in last) / len(last):.1%}"
        self.draw(completed=pl_module.steps, state=state)
