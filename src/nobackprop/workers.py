"""Seeds side by side on a CPU: each is trained in a process of its own, forked when the data is loaded.

A fork has all imports and shares the images with its parent; a fresh process would spend seconds on the first and need
memory for the second. torch's threads do not survive a fork, so seeds with several threads are trained in turn.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig

from nobackprop.callbacks import Screen
from nobackprop.stopping import Stopped, StopSignals

PATIENCE_S = 60.0  # for a checkpoint, when workers are asked to end
Job = TypeVar("Job")
Result = TypeVar("Result")


def workers(jobs: int, threads: int, most: int | None = None) -> int:
    """How many processes to train in: at the most one a core, and `most` if that is given; 1: in this process.

    It is 1 where seeds have several threads, where the system can't fork safely (macOS, Windows), in a process that may
    have no children, and, unless `most` is given, in a launcher's job, beside which others run on the same cores.
    """
    if jobs == 1 or threads > 1 or sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    if most is None:
        most = 1 if _beside_other_jobs() else jobs
    return min(jobs, most, cores())


def cores() -> int:
    """The cores granted to this process: by affinity, a container's quota, SLURM, or LOKY_MAX_CPU_COUNT."""
    from joblib import cpu_count  # here, since a run of one seed does not ask

    if "SLURM_JOB_ID" in os.environ:
        return min(cpu_count(), int(os.environ.get("SLURM_CPUS_PER_TASK", 1)))
    return cpu_count()


def _beside_other_jobs() -> bool:
    """Whether Hydra's launcher runs several jobs at once on this machine; a job of SLURM has cores of its own."""
    if not HydraConfig.initialized() or "SLURM_JOB_ID" in os.environ:
        return False
    launcher: Any = HydraConfig.get().launcher
    return not launcher._target_.endswith(".BasicLauncher")


def side_by_side(
    work: Callable[[Job, Screen], Result], jobs: Sequence[Job], count: int, screen: Screen
) -> Iterator[tuple[Job, Result]]:
    """Gives each job with `work(job, screen)` as they end, done by up to `count` processes at once; 1: by this one.

    The first error is raised at once; the other processes are asked to end, as they are by Ctrl-C, and write a
    checkpoint. Raises ChildProcessError where a process was killed.
    """
    if count == 1:
        for job in jobs:
            yield job, work(job, screen)
        return
    waiting = deque(jobs)
    running: dict[Connection, tuple[Any, Job]] = {}
    with StopSignals() as signals:
        try:
            while waiting or running:
                while waiting and len(running) < count:
                    receiver, process = _fork(work, waiting[0], [*running], signals)
                    running[receiver] = process, waiting.popleft()
                for receiver in wait([*running], timeout=0.5):
                    assert isinstance(receiver, Connection)
                    process, job = running[receiver]
                    try:
                        kind, content = receiver.recv()
                    except EOFError:
                        raise ChildProcessError(_epitaph(process)) from None
                    if kind == "show":
                        _show(screen, content)
                        continue
                    process.join()
                    del running[receiver]
                    if kind == "error":
                        raise content
                    yield job, content
                signals.check()
        finally:
            _end(running, screen)


def _fork(work: Callable[..., Any], job: Any, others: list[Connection], signals: StopSignals) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, job, sender, [*others, receiver], signals), daemon=True)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        process.start()  # Python 3.12 warns where there are threads, even those of a library that minds forks
    sender.close()
    return receiver, process


def _child(
    work: Callable[..., Any], job: Any, sender: Connection, receivers: list[Connection], signals: StopSignals
) -> None:
    """Does a job in a new process, and sends what is to be shown and what came of it."""
    for receiver in receivers:  # so that sending fails, and this process ends, when the parent is no more
        receiver.close()
    for signum, handler in signals.before.items():
        signal.signal(signum, handler)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which asks by SIGUSR2
    signal.signal(signal.SIGUSR2, lambda *_: None)  # something to call, so that StopSignals listens to it
    try:
        sender.send(("result", work(job, _Remote(sender))))
    except Stopped:
        raise
    except BaseException as error:
        error.add_note(f"In a process of its own:\n{traceback.format_exc()}")
        with suppress(BrokenPipeError):
            sender.send(("error", error))


class _Remote:
    """The parent's screen."""

    def __init__(self, sender: Connection) -> None:
        self.sender = sender

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.sender.send(("show", (name, args, kwargs)))


def _show(screen: Screen, content: tuple[str, Any, Any]) -> None:
    name, args, kwargs = content
    getattr(screen, name)(*args, **kwargs)


def _end(running: dict[Connection, tuple[Any, Any]], screen: Screen) -> None:
    """Asks processes to end and waits until they have, showing what they still have to say."""
    for process, _ in running.values():
        os.kill(process.pid, signal.SIGUSR2)
    deadline = time.monotonic() + PATIENCE_S
    while running and time.monotonic() < deadline:
        for receiver in wait([*running], timeout=0.5):
            assert isinstance(receiver, Connection)
            try:
                kind, content = receiver.recv()
                if kind == "show":
                    _show(screen, content)
            except EOFError:
                process, _ = running.pop(receiver)
                process.join()
    for process, _ in running.values():
        process.kill()
        process.join()


def _epitaph(process: Any) -> str:
    process.join()
    code = process.exitcode
    if code == -signal.SIGKILL:
        how = "killed, perhaps for want of memory (fewer `workers` need less)"
    else:
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return f"a process that trained a seed was {how}; the same command goes on from the last checkpoints"
