"""Launchers that train a sweep's jobs on this machine: one after another, or side by side."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch
from omegaconf import OmegaConf
from pydantic import PositiveInt
from rich.console import Console

from nobackprop.records import provenance
from nobackprop.records.machine import cores
from nobackprop.sweeps.jobs import Job, Outcome, Say, attempt
from nobackprop.training import hardware
from nobackprop.training.processes import Pool, can_fork
from nobackprop.training.screens import Screen
from nobackprop.training.stopping import how_it_ended


@dataclass(frozen=True)
class Basic:
    """One job after another, in this process."""

    def at_once(self, jobs: Sequence[Job]) -> int:
        return 1

    def run(
        self, jobs: Mapping[int, Job], say: Say, console: Console, wait_for_others: bool
    ) -> Iterator[tuple[int, Outcome]]:
        for i, job in jobs.items():
            say(i, "starts")
            yield i, attempt(job, console, wait_for_others)


@dataclass(frozen=True)
class Processes:
    """Side by side, in `workers` processes that train job after job. The default, and the most, is what the granted
    cores allow.
    """

    workers: PositiveInt | None = None

    def at_once(self, jobs: Sequence[Job]) -> int:
        most = room(jobs)
        return max(1, min(self.workers or most, most, len(jobs)))

    def run(
        self, jobs: Mapping[int, Job], say: Say, console: Console, wait_for_others: bool
    ) -> Iterator[tuple[int, Outcome]]:
        numbers, given = [*jobs], [beside_others(job) for job in jobs.values()]
        if all(map(_can_fork, given)):  # which shares all that is imported and read here
            context = get_context("fork")
            for job in given:  # of the code that was imported here, whatever is checked out or edited later
                provenance.code_of(job.settings.identity())
            _read_images(jobs.values())
        else:
            context = get_context("forkserver")  # so that torch and Lightning are imported once
            context.set_forkserver_preload([__name__])
        work = partial(_attempt, wait_for_others)
        pool = Pool(work, context, _died, Screen(console))
        for k, outcome in pool.run(given, self.at_once(given), lambda k: say(numbers[k], "starts")):
            yield numbers[k], outcome


def _can_fork(job: Job) -> bool:
    """Whether a fork can do a job: in one thread and one process, on the CPU."""
    c = job.config
    alone = can_fork(c.threads * (c.workers or 1)) and c.trainer.strategy != "ddp"
    return alone and not hardware.on_gpu(c.trainer.accelerator)


def _read_images(jobs: Iterable[Job]) -> None:
    """Reads the images of jobs, for their forks, each data set once."""
    for source in dict.fromkeys(job.run.source for job in jobs):
        with suppress(Exception):  # which the job itself meets again, and tells
            _ = source.load().fingerprint


def _attempt(wait_for_others: bool, job: Job, screen: Screen) -> Outcome:
    """The work of a process on a job. Its progress is not shown, since the bars of several jobs would get mixed up."""
    torch.set_num_threads(job.config.threads)  # before a first step is tried: a fork has no other threads
    return attempt(job, Console(quiet=True), wait_for_others)


def _died(job: Job | None, status: int) -> Outcome:
    return Outcome.failure(f"its process {how_it_ended(status)}")


def room(jobs: Sequence[Job]) -> int:
    """How many of these jobs the granted cores can train at once, by their threads."""
    return max(1, cores() // max((job.config.threads * (job.config.workers or 1) for job in jobs), default=1))


def beside_others(job: Job) -> Job:
    """A job that shares this machine's cores with others. Its seeds stay in one process unless `workers` is given."""
    return replace(job, config=OmegaConf.merge(job.config, {"workers": job.config.workers or 1}))
