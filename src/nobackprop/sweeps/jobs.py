"""Where the jobs of a sweep are trained, each class a choice of conf/launcher: here, side by side, or on a cluster."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, Literal, Protocol, Self

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
    """One config of a sweep, and what it is called there."""

    label: str
    config: DictConfig

    def file(self, name: str) -> Path:
        """A file in the run's folder on these seeds alone: jobs of other seeds have the same folder."""
        s = self.settings
        return s.folder / f"{name}_{digest({'seeds': s.seeds})}.txt"

    @cached_property
    def settings(self) -> Settings:
        """Raises Mistake where the config is not valid."""
        return Settings.of(self.config)

    @cached_property
    def run(self) -> Run:
        """What the config means in this process. Raises Mistake where that can't work."""
        run = configure(self.settings)
        check(run)
        return run

    def __reduce__(self) -> Any:  # another process makes its own of these
        return Job, (self.label, self.config)


@dataclass(frozen=True)
class Outcome:
    """What became of a job. `reason` is one line, `details` all there is to say about a failure."""

    state: Literal["finished", "recorded", "failed", "stopped", "busy", "queued"]
    reason: str = ""
    details: str = ""
    records: Sequence[Record] = ()

    @classmethod
    def failure(cls, error: Exception | str) -> Self:
        """Of bad input its message is told, of any other exception the traceback, too."""
        text = details = str(error)
        if isinstance(error, Exception) and not isinstance(error, Mistake | ChildProcessError):
            text, details = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
        return cls("failed", (text.splitlines() or [""])[0], details)

    @property
    def objective(self) -> float | None:
        """The mean over the seeds of the best validation accuracy, 0 for one that diverged; None without records."""
        return mean(r.validation for r in self.records) if self.records else None


Say = Callable[[int, str], None]  # a job's number, and what is said of it


class Launcher(Protocol):
    """Where the jobs of a sweep are trained, and how many at a time."""

    def at_once(self, jobs: Sequence[Job]) -> int: ...

    def run(
        self, jobs: Mapping[int, Job], say: Say, console: Console, wait_for_others: bool
    ) -> Iterator[tuple[int, Outcome]]:
        """The outcome of each job, when it is known; `say` tells the user that a job starts, `console` its progress.

        Without `wait_for_others`, a job of which another process trains a seed is busy.
        """
        ...


def attempt(job: Job, console: Console, wait_for_others: bool) -> Outcome:
    """Trains a job. Whatever goes wrong is an outcome, too."""
    try:
        with about_files(job.config):
            records = train(job.run, console, wait_for_others)
    except Busy as e:
        return Outcome("busy", str(e))
    except Exception as e:
        return Outcome.failure(e)
    return Outcome("finished", records=records)


def note(job: Job, outcome: Outcome) -> None:
    """Leaves the reason of a failure in the run's folder, so that the next attempt can say what it repeats."""
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
