"""Launchers that train a sweep's jobs on this machine: one after another, or side by side."""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from signal import SIGTERM
from threading import Thread
from typing import Any

from omegaconf import OmegaConf
from pydantic import PositiveInt
from rich.console import Console

from nobackprop.records.machine import cores
from nobackprop.sweeps.jobs import Job, Outcome, Say, attempt
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
class Joblib:
    """A process for each job, `workers` at a time: by default, and at most, what the granted cores have threads for.

    joblib's own pool is not used, since one process that dies takes all others of the pool with it.
    """

    workers: PositiveInt | None = None

    def at_once(self, jobs: Sequence[Job]) -> int:
        most = _room(jobs)
        return max(1, min(self.workers or most, most, len(jobs)))

    def run(
        self, jobs: Mapping[int, Job], say: Say, console: Console, wait_for_others: bool
    ) -> Iterator[tuple[int, Outcome]]:
        context = get_context("forkserver")  # so that torch and Lightning are imported once
        context.set_forkserver_preload([__name__])
        waiting = deque(jobs)
        running: dict[Any, tuple[int, Any]] = {}
        most = self.at_once(list(jobs.values()))
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    i = waiting.popleft()
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(_beside_others(jobs[i]), wait_for_others, sender))
                    say(i, "starts")
                    process.start()
                    sender.close()
                    running[receiver] = i, process
                ready = connection.wait(list(running))
                for receiver in [r for r in running if r in ready]:
                    i, process = running[receiver]
                    try:
                        outcome = receiver.recv()
                        process.join()
                    except (EOFError, OSError):
                        process.join()
                        outcome = Outcome.failure(f"its process {how_it_ended(process.exitcode)}")
                    del running[receiver]
                    yield i, outcome
        finally:  # all at an end, or the user stopped the sweep: let the others write their checkpoints
            for _, process in running.values():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, SIGTERM)
            for _, process in running.values():
                process.join()


def _room(jobs: Sequence[Job]) -> int:
    """How many of these jobs the granted cores have threads for."""
    return max(1, cores() // max((job.config.threads * (job.config.workers or 1) for job in jobs), default=1))


def _beside_others(job: Job) -> Job:
    """A job that shares this machine's cores with others: its seeds stay in one process unless `workers` is given."""
    return replace(job, config=OmegaConf.merge(job.config, {"workers": job.config.workers or 1}))


def _work(job: Job, wait_for_others: bool, sender: connection.Connection) -> None:
    """What a worker process does. It ends, after a checkpoint, when the process that started it is gone."""
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), SIGTERM)

    Thread(target=follow, daemon=True).start()
    sender.send(attempt(job, Console(quiet=True), wait_for_others))
