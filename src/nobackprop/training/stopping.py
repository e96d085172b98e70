"""Ending a run that is asked to end (Ctrl-C, a kill, a cluster's notice): it writes a checkpoint first."""

import signal
import threading
import time
from types import FrameType
from typing import Any

AGAIN_S = 1.0  # seconds between two Ctrl-C


class Stopped(SystemExit):
    """The run was asked to end, and ended after a checkpoint. The exit status is 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)


def how_it_ended(status: int) -> str:
    """How a child process ended, by its exit code, such as "was killed by SIGKILL (out of memory?)"."""
    names = {s.value: s.name for s in signal.Signals}
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return f"was stopped by {names[status - 128]}"
    if status < 0:
        return f"was killed by {names.get(-status, -status)}{' (out of memory?)' * (status == -signal.SIGKILL)}"
    return f"ended with status {status}"


class StopSignals:
    """While this context is open, signals are noted and wait for `check`, called where nothing can be lost.

    SIGINT (Ctrl-C) and SIGTERM end the run; a second Ctrl-C, a second later, ends it at once. (Sooner, it may be the
    same one, passed on by what started this process.) Under a cluster's launcher, which handles signals of its own,
    SIGUSR2 means that time is up: `check` raises Stopped, and the launcher's handler, called when the context closes,
    puts the job back into the queue. There SIGTERM is only a warning: `due` asks for a checkpoint.
    """

    def __enter__(self) -> "StopSignals":
        self.signum: int | None = None
        self.at = 0.0
        self.due = False
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # others can't, and get no signals
            wanted = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
            if not callable(wanted[signal.SIGUSR2]):
                del wanted[signal.SIGUSR2]
            self.before = {s: handler for s, handler in wanted.items() if handler != signal.SIG_IGN}
            self.listen()
        return self

    def listen(self) -> None:
        """Takes the signals, and takes them again if another handler has been set since."""
        for signum in self.before:
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.due = True
        if signum == signal.SIGTERM and callable(self.before[signum]):
            return
        if self.signum == signum == signal.SIGINT:
            if time.monotonic() - self.at > AGAIN_S:
                raise Stopped(signum)
            return
        self.signum, self.at = signum, time.monotonic()

    def check(self) -> None:
        """Raises Stopped where a signal asked for it."""
        self.due = False
        if self.signum is not None:
            raise Stopped(self.signum)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        if self.signum == signal.SIGUSR2 and (kind is None or issubclass(kind, Stopped)):
            self.before[signal.SIGUSR2](signal.SIGUSR2, None)
