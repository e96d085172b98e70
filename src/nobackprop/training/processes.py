"""Jobs side by side in processes of their own: seeds of a run, or the runs of a sweep.

On a CPU, seeds are trained in processes that are forked once the data is loaded. A fork has all imports and shares the
images with its parent. A fresh process would need seconds for the imports and memory for the images. torch's threads do
not survive a fork, so seeds with several threads are trained in turn.

A pool of the standard library or of joblib would not do. If one of its processes dies, it ends all others, or waits for
the lost job for ever, and it does not let the others write their checkpoints.
"""

import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import Any, Generic, TypeVar, cast

from nobackprop.records.machine import cores
from nobackprop.training.ddp import portable
from nobackprop.training.screens import Screen
from nobackprop.training.stopping import StopSignals, how_it_ended

PATIENCE_S = 60.0  # for a checkpoint, when processes are asked to end
Job = TypeVar("Job")
Result = TypeVar("Result")


def can_fork(threads: int) -> bool:
    """Whether this process may have forks that train with so many threads.

    It may not where they have several, where the system can't fork safely (macOS, Windows), or as a fork itself.
    """
    return threads == 1 and sys.platform == "linux" and not multiprocessing.current_process().daemon


def workers(jobs: int, threads: int, most: int | None = None) -> int:
    """How many processes to train seeds in: at most one for each core, and at most `most` if that is given.

    1 means this process. It is 1 where seeds can't be trained in forks.
    """
    return min(jobs, most or jobs, cores()) if jobs > 1 and can_fork(threads) else 1


def side_by_side(
    work: Callable[[Job, Screen], Result], jobs: Sequence[Job], count: int, screen: Screen
) -> Iterator[tuple[Job, Result]]:
    """Gives each job with the result of `work(job, screen)`, as jobs end. Up to `count` forks work at once.

    With a `count` of 1 this process does the work. The first error is raised at once. The other processes are then
    asked to end, as by Ctrl-C, and write a checkpoint. Raises ChildProcessError, which names the job, where its process
    was killed or stopped.
    """
    if count == 1:
        for job in jobs:
            yield job, work(job, screen)
        return

    def died(job: Job | None, status: int) -> Result:
        told = "a process" if job is None else f"the process that trained {job}"
        less = " (with fewer `workers` in less memory)" if status == -signal.SIGKILL else ""
        how = f"{how_it_ended(status)}; the same command goes on from the last checkpoints{less}"
        raise ChildProcessError(f"{told} {how}")

    pool = Pool(work, multiprocessing.get_context("fork"), died, screen)
    for number, result in pool.run(jobs, count):
        yield jobs[number], result


@dataclass
class Pool(Generic[Job, Result]):
    """Processes that do `work(job, screen)`. What they show appears on the `screen` of this process.

    A process does job after job. If it ends before its job, the result of the job is `died(job, exit status)`, which
    may raise, and another process takes its place. If it ends between jobs, the job is None.
    """

    work: Callable[[Job, Screen], Result]
    context: Any  # of multiprocessing
    died: Callable[[Job | None, int], Result]
    screen: Screen
    running: dict[Connection, Any] = field(default_factory=dict)  # the process behind each

    def run(
        self, jobs: Sequence[Job], count: int, starting: Callable[[int], None] = lambda _: None
    ) -> Iterator[tuple[int, Result]]:
        """Gives the number of each job with its result, as jobs end. Up to `count` jobs run at once.

        `starting(number)` is called when a job starts. An error of `work` is raised. Whatever ends this, the processes
        that still run are asked to end, and are waited for.
        """
        waiting = deque(range(len(jobs)))
        working: dict[Connection, int] = {}

        def give(connection: Connection) -> None:
            """Sends a process its next job, or the word that there is none left."""
            number = waiting.popleft() if waiting else None
            try:
                connection.send(None if number is None else number if self.forks else jobs[number])
            except BrokenPipeError:  # it was killed, as will be noticed, and another process does the job
                waiting.extendleft([] if number is None else [number])
                return
            if number is not None:
                working[connection] = number
                starting(number)

        with StopSignals() as signals:
            try:
                while waiting or self.running:
                    while waiting and len(self.running) < count:
                        give(self._start(jobs, signals))
                    for connection, kind, content in self._messages():
                        if kind == "end":
                            status = self.running.pop(connection).exitcode or 0
                            if connection in working:
                                number = working.pop(connection)
                                yield number, self.died(jobs[number], status)
                            elif status:
                                self.died(None, status)
                        elif kind == "error":
                            raise content
                        else:
                            yield working.pop(connection), content
                            give(connection)  # after what is told of the job before
                    signals.check()
            finally:
                self._end()

    @property
    def forks(self) -> bool:
        """Whether processes have the jobs already, so that a number is all they need."""
        return self.context.get_start_method() == "fork"

    def _start(self, jobs: Sequence[Job], signals: StopSignals) -> Connection:
        ours, theirs = self.context.Pipe()
        inherited = (jobs, [*self.running, ours], signals.before) if self.forks else (None, (), {})
        # A fork may have no processes of its own: it would inherit what is its parent's.
        process = self.context.Process(target=_worker, args=(self.work, theirs, *inherited), daemon=self.forks)
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            process.start()  # Python 3.12 warns where there are threads, even those of a library that minds forks
        theirs.close()
        self.running[ours] = process
        return ours

    def _messages(self) -> Iterator[tuple[Connection, str, Any]]:
        """What processes have sent within half a second, except what is shown; "end" from a process that has ended."""
        for connection in wait([*self.running], timeout=0.5):
            assert isinstance(connection, Connection)
            content: Any = None
            try:
                kind, content = connection.recv()
            except (EOFError, ConnectionResetError):
                self.running[connection].join()
                kind = "end"
            if kind == "show":
                name, args, kwargs = content
                getattr(self.screen, name)(*args, **kwargs)
            else:
                yield connection, kind, content

    def _end(self) -> None:
        """Asks processes to end and waits until they have. What they still say is shown."""
        for process in self.running.values():
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, signal.SIGUSR2)
        deadline = time.monotonic() + PATIENCE_S
        while self.running and time.monotonic() < deadline:
            for connection, kind, _ in self._messages():
                if kind == "end":
                    del self.running[connection]
        for process in self.running.values():
            process.kill()
            process.join()


def _worker(
    work: Callable[..., Any],
    connection: Connection,
    jobs: Sequence[Any] | None,
    inherited: Sequence[Connection],
    handlers: dict[int, Any],
) -> None:
    """The work of a new process: it does the jobs that it is sent, and sends back what is to be shown and the results.

    It ends, after a checkpoint, when it is asked to, or when the process that started it has ended.
    """
    for other in inherited:  # so that this process learns when its parent is no more
        other.close()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which asks by SIGUSR2
    signal.signal(signal.SIGUSR2, lambda *_: sys.exit())  # between jobs; within, StopSignals listens
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGUSR2)

    Thread(target=follow, daemon=True).start()
    with suppress(EOFError, BrokenPipeError):
        try:
            while (job := connection.recv()) is not None:
                each = job if jobs is None else jobs[job]
                connection.send(("result", work(each, cast(Screen, _Remote(connection)))))
        except Exception as error:
            connection.send(("error", portable(error)))


class _Remote:
    """The parent's screen."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.connection.send(("show", (name, args, kwargs)))
