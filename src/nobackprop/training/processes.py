"""Seeds side by side on a CPU: trained in processes that are forked when the data is loaded.

A fork has all imports and shares the images with its parent; a fresh process would spend seconds on the first and need
memory for the second. torch's threads do not survive a fork, so seeds with several threads are trained in turn.
"""

import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar, cast

from nobackprop.records.machine import cores
from nobackprop.training.ddp import portable
from nobackprop.training.screens import Screen
from nobackprop.training.stopping import StopSignals, how_it_ended

PATIENCE_S = 60.0  # for a checkpoint, when workers are asked to end
Job = TypeVar("Job")
Result = TypeVar("Result")


def workers(jobs: int, threads: int, most: int | None = None) -> int:
    """How many processes to train in: at the most one a core, and `most` if that is given; 1: in this process.

    It is 1 where seeds have several threads, where the system can't fork safely (macOS, Windows), and in a process that
    may have no children.
    """
    if jobs == 1 or threads > 1 or sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return min(jobs, most or jobs, cores())


def side_by_side(
    work: Callable[[Job, Screen], Result], jobs: Sequence[Job], count: int, screen: Screen
) -> Iterator[tuple[Job, Result]]:
    """Gives each job with `work(job, screen)` as they end, done by up to `count` processes at once; 1: by this one.

    The first error is raised at once; the other processes are asked to end, as they are by Ctrl-C, and write a
    checkpoint. Raises ChildProcessError, with the name that a job has as text, where its process was killed or stopped.
    """
    if count == 1:
        for job in jobs:
            yield job, work(job, screen)
        return
    waiting = deque(range(len(jobs)))
    running: dict[Connection, ForkProcess] = {}
    working: dict[Connection, Job] = {}

    def give(connection: Connection) -> None:
        """A process its next job, or word that there is none left."""
        index = waiting.popleft() if waiting else None
        if index is not None:
            working[connection] = jobs[index]
        with suppress(BrokenPipeError):  # it was killed, as will be noticed
            connection.send(index)

    with StopSignals() as signals:
        try:
            for _ in range(count):
                connection, process = _fork(work, jobs, [*running], signals)
                running[connection] = process
                give(connection)
            while running:
                for connection, kind, content in _messages(running):
                    if kind == "show":
                        _show(screen, content)
                    elif kind == "end":
                        status = running.pop(connection).exitcode or 0
                        if status or connection in working:
                            raise ChildProcessError(_how(working.get(connection), status))
                    elif kind == "error":
                        raise content
                    else:
                        job = working.pop(connection)
                        give(connection)
                        yield job, content
                signals.check()
        finally:
            _end(running, screen)


def _fork(
    work: Callable[..., Any], jobs: Sequence[Any], others: list[Connection], signals: StopSignals
) -> tuple[Connection, ForkProcess]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_worker, args=(work, jobs, theirs, [*others, ours], signals), daemon=True)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        process.start()  # Python 3.12 warns where there are threads, even those of a library that minds forks
    theirs.close()
    return ours, process


def _worker(
    work: Callable[..., Any],
    jobs: Sequence[Any],
    connection: Connection,
    inherited: list[Connection],
    signals: StopSignals,
) -> None:
    """In a new process: does the jobs whose numbers come, sends what is to be shown and what came of them."""
    for other in inherited:  # so that this process learns when its parent is no more
        other.close()
    for signum, handler in signals.before.items():
        signal.signal(signum, handler)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which asks by SIGUSR2
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit())  # between jobs; within, StopSignals listens
    with suppress(EOFError, BrokenPipeError):
        try:
            while (index := connection.recv()) is not None:
                connection.send(("result", work(jobs[index], cast(Screen, _Remote(connection)))))
        except Exception as error:
            connection.send(("error", portable(error)))


class _Remote:
    """The parent's screen."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.connection.send(("show", (name, args, kwargs)))


def _show(screen: Screen, content: tuple[str, Any, Any]) -> None:
    name, args, kwargs = content
    getattr(screen, name)(*args, **kwargs)


def _messages(running: Mapping[Connection, ForkProcess]) -> Iterator[tuple[Connection, str, Any]]:
    """What has come from processes within half a second; "end" from one that is no more."""
    for connection in wait([*running], timeout=0.5):
        assert isinstance(connection, Connection)
        try:
            kind, content = connection.recv()
        except (EOFError, ConnectionResetError):
            running[connection].join()
            kind, content = "end", None
        yield connection, kind, content


def _end(running: dict[Connection, ForkProcess], screen: Screen) -> None:
    """Asks processes to end and waits until they have, showing what they still have to say."""
    for process in running.values():
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGUSR2)
    deadline = time.monotonic() + PATIENCE_S
    while running and time.monotonic() < deadline:
        for connection, kind, content in _messages(running):
            if kind == "show":
                _show(screen, content)
            elif kind == "end":
                del running[connection]
    for process in running.values():
        process.kill()
        process.join()


def _how(job: object, status: int) -> str:
    told = "a process" if job is None else f"the process that trained {job}"
    less = " (with fewer `workers` in less memory)" if status == -signal.SIGKILL else ""
    return f"{told} {how_it_ended(status)}; the same command goes on from the last checkpoints{less}"
