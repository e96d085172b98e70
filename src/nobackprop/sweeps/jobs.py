"""The jobs of a sweep, and launchers that train them: here, side by side, or on a cluster (conf/launcher)."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, Literal, Protocol, Self

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from nobackprop.mistakes import Mistake, about_files
from nobackprop.records.files import write_atomically
from nobackprop.records.identity import digest
from nobackprop.records.record import Record
from nobackprop.training.build import Run, check, configure
from nobackprop.training.config import Settings, build
from nobackprop.training.run import Busy, train


@dataclass(frozen=True)
class Job:
    """One config of a sweep, and its label there."""

    label: str
    config: DictConfig

    def file(self, name: str) -> Path:
        """A file in the run's folder that is about these seeds only, since jobs of other seeds share the folder."""
        s = self.settings
        return s.folder / f"{name}_{digest({'seeds': s.seeds})}.txt"

    @cached_property
    def settings(self) -> Settings:
        """Raises Mistake where the config is not valid."""
        return Settings.of(self.config)

    @cached_property
    def run(self) -> Run:
        """The run that the config makes in this process. Raises Mistake where that can't work."""
        run = configure(self.settings)
        check(run)
        return run

    def __reduce__(self) -> Any:  # another process makes its own
        return Job, (self.label, self.config)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job. `reason` is one line, and `details` is all there is to say about a failure."""

    state: Literal["finished", "recorded", "failed", "stopped", "busy", "queued"]
    reason: str = ""
    details: str = ""
    records: Sequence[Record] = ()

    @classmethod
    def failure(cls, error: Exception | str) -> Self:
        """The outcome of a failure: the message for bad input, and for any other exception also the traceback."""
        text = details = str(error)
        if isinstance(error, Exception) and not isinstance(error, Mistake | ChildProcessError):
            text, details = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        return cls("failed", (text.splitlines() or [""])[0], details)

    @property
    def objective(self) -> float | None:
        """The mean over seeds of the best validation accuracy; 0 for a seed that diverged, None without records."""
        return mean(r.validation for r in self.records) if self.records else None


Say = Callable[[int, str], None]  # a job's number, and what is said of it


class Launcher(Protocol):
    """Trains the jobs of a sweep, several at a time or one after another."""

    def at_once(self, jobs: Sequence[Job]) -> int: ...

    def run(
        self, jobs: Mapping[int, Job], say: Say, console: Console, wait_for_others: bool
    ) -> Iterator[tuple[int, Outcome]]:
        """Gives the outcome of each job when it is known. `say` tells that a job starts, `console` shows its progress.

        Without `wait_for_others`, a job is busy if another process trains one of its seeds.
        """
        ...


def attempt(job: Job, console: Console, wait_for_others: bool) -> Outcome:
    """Trains a job. A failure is an outcome, too."""
    torch.manual_seed(0)  # what a job before drew, as a user's own rule may, is none of this one's
    try:
        with about_files(job.config):
            records = train(job.run, console, wait_for_others)
    except Busy as e:
        return Outcome("busy", str(e))
    except Exception as e:
        return Outcome.failure(e)
    return Outcome("finished", records=records)


def note(job: Job, outcome: Outcome) -> None:
    """Writes the reason of a failure into the run's folder, so that the next attempt can tell what it repeats."""
    path = job.file("error")
    if outcome.state == "finished":
        path.unlink(missing_ok=True)
    elif outcome.state == "failed":
        with suppress(OSError):  # a full disk
            write_atomically(path, outcome.details.encode())


def launcher_of(config: DictConfig) -> Launcher:
    """The launcher that a config names. Raises Mistake where its keys don't fit."""
    node: Any = OmegaConf.to_container(config.launcher, resolve=True)
    return build(node, "launcher")
