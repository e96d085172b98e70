"""A sweep that is killed at twenty random moments, and started again each time, ends like one left alone."""

import os
import random
import signal
import time
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import pytest
from conftest import same_results, small
from rich.console import Console

KILLS = 20
EPOCHS = 16
FORKSERVER = get_context("forkserver")


def sweep(runs: Path, begun: connection.Connection, die_at_write: int | None) -> None:
    """A sweep of three configs of two seeds, in a process of its own. Tells when training has begun.

    `die_at_write`: the process kills itself in the midst of that write, before or after the data is on the disk.
    """
    from nobackprop.sweeps import jobs, local, sweep
    from nobackprop.training.checkpoints import ResumePoint

    on_train_start, fsync = ResumePoint.on_train_start, os.fsync
    writes = 0

    def start(self: ResumePoint, trainer: Any, pl_module: Any) -> None:
        on_train_start(self, trainer, pl_module)
        begun.send(None)

    def write(fd: int) -> None:
        nonlocal writes
        writes += 1
        if writes == die_at_write and writes % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)
        if writes == die_at_write:
            os.kill(os.getpid(), signal.SIGKILL)

    ResumePoint.on_train_start = start
    os.fsync = write
    jobs = [
        jobs.Job(
            rule, small(runs, f"rule={rule}", "seeds=2", f"max_epochs={EPOCHS}", "checkpoint_minutes=0", "workers=1")
        )
        for rule in ("bp", "dfa", "mdfa")
    ]
    outcomes = sweep.run(jobs, local.Basic(), Console(quiet=True))
    raise SystemExit(any(outcome.state not in ("finished", "recorded") for outcome in outcomes))


@pytest.mark.faults
def test_no_record_is_lost_by_twenty_kills(tmp_path: Path) -> None:
    FORKSERVER.set_forkserver_preload(["nobackprop.sweeps", "hydra", __name__])  # so that a start takes no imports

    def start(runs: Path, die_at_write: int | None = None, kill_after: float | None = None) -> tuple[int | None, float]:
        """Runs the sweep until it ends or is killed; its exit status, and the seconds since training began."""
        receiver, sender = FORKSERVER.Pipe(duplex=False)
        process = FORKSERVER.Process(target=sweep, args=(runs, sender, die_at_write))
        process.start()
        sender.close()
        receiver.recv()
        began = time.monotonic()
        process.join(kill_after)
        if kill_after is not None:
            process.kill()
            process.join()
        return process.exitcode, time.monotonic() - began

    chance = random.Random(0)
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    status, seconds = start(alone)
    assert status == 0
    pause = seconds / KILLS / 2  # on the average, so that the sweep is not over before the last kill
    interrupted = []
    for i in range(KILLS):
        if i % 2:
            status, _ = start(killed, die_at_write=chance.randrange(2, 24))
        else:
            status, _ = start(killed, kill_after=chance.expovariate(1 / pause))
        assert status == -signal.SIGKILL, f"the sweep was over before kill {i + 1}"
        interrupted.append(len(list(killed.glob("*/seed*/record.json"))))
    assert len(set(interrupted)) > 1  # some kills came before the first record, some after
    assert start(killed)[0] == 0
    records = same_results(alone, killed)
    assert records == 6
    assert not [path for path in killed.rglob(".*") if path.name != ".lock"]  # what was being written
    assert not list(killed.glob("*/checkpoints"))
    print(f"\n{KILLS} kills, of which {KILLS // 2} in a write; records after each: {interrupted}; {records} in the end")
