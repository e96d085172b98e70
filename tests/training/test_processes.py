"""Seeds side by side: the same records as alone, no more processes than cores, and what happens when one goes wrong."""

import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, Config, folder, same_results, small, train, until
from rich.console import Console

import nobackprop.training.processes
import nobackprop.training.run
from nobackprop import cli
from nobackprop.records.machine import cores
from nobackprop.records.record import Record
from nobackprop.training.processes import Pool, side_by_side, workers
from nobackprop.training.screens import Screen

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")


@pytest.fixture
def screen() -> Screen:
    return Screen(Console(file=io.StringIO()))


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nobackprop.training.processes, "cores", lambda: 2)


@pytest.mark.usefixtures("two_cores")
def test_seeds_are_the_same_to_the_bit_side_by_side_and_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = train(small(tmp_path / "beside", "seeds=3", "max_epochs=1"))
    monkeypatch.setattr(Pool, "_start", lambda *_: pytest.fail("workers=1 has no workers"))
    train(small(tmp_path / "alone", "seeds=3", "max_epochs=1", "workers=1"))
    assert [r.seed for r in records] == [0, 1, 2]
    assert [r.machine.threads for r in records] == [1, 1, 1]
    assert same_results(tmp_path / "beside", tmp_path / "alone") == 3


def test_there_are_as_many_processes_as_asked_for_and_they_share_the_jobs(screen: Screen) -> None:
    def work(job: int, screen: Screen) -> tuple[int, float, float]:
        start = time.monotonic()
        time.sleep(0.2)
        return os.getpid(), start, time.monotonic()

    done = dict(side_by_side(work, range(5), 2, screen))
    assert sorted(done) == list(range(5))
    assert len({pid for pid, _, _ in done.values()} - {os.getpid()}) == 2
    at_once = [sum(start <= moment < stop for _, start, stop in done.values()) for _, moment, _ in done.values()]
    assert max(at_once) == 2


def test_a_job_is_said_to_start_after_the_one_before_it_has_ended(screen: Screen) -> None:
    told: list[str] = []
    pool = Pool(lambda job, screen: job, multiprocessing.get_context("fork"), lambda job, status: -1, screen)
    for number, _ in pool.run(range(4), 1, lambda number: told.append(f"{number} starts")):
        told.append(f"{number} ended")
    assert told == [f"{number} {what}" for number in range(4) for what in ("starts", "ended")]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"jobs": 10, "threads": 1}, 3),
        ({"jobs": 2, "threads": 1}, 2),
        ({"jobs": 10, "threads": 1, "most": 2}, 2),
        ({"jobs": 10, "threads": 1, "most": 8}, 3),
        ({"jobs": 10, "threads": 2}, 1),
        ({"jobs": 1, "threads": 1}, 1),
    ],
)
def test_never_more_workers_than_cores(monkeypatch: pytest.MonkeyPatch, asked: dict[str, int], expected: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 9})
    assert workers(**asked) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"LOKY_MAX_CPU_COUNT": "2"}, 2),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "2"}, 2),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "9"}, 3),
        ({"SLURM_JOB_ID": "7"}, 1),
    ],
)
def test_a_launchers_or_a_clusters_grant_counts(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 9})
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cores() == expected


@pytest.mark.usefixtures("two_cores")
def test_a_process_that_may_have_no_children_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(multiprocessing.current_process()), "daemon", True)
    assert workers(10, 1) == 1


def test_the_first_error_ends_all_at_once_and_says_where_it_was(tmp_path: Path, screen: Screen) -> None:
    def work(job: int, screen: Screen) -> int:
        if job == 0:
            return job
        if job == 1:
            until(lambda: list(tmp_path.iterdir()))
            raise ValueError("the second job went wrong")
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)
        return job

    done, start = [], time.monotonic()
    with pytest.raises(ValueError, match="the second job went wrong") as raised:
        done.extend(side_by_side(work, range(4), 2, screen))
    assert done == [(0, 0)]
    assert time.monotonic() - start < 30
    assert "in work" in "".join(raised.value.__notes__)
    (pid,) = (int(path.name) for path in tmp_path.iterdir())
    assert not Path(f"/proc/{pid}").exists()


def test_an_error_that_cannot_be_sent_is_told_all_the_same(screen: Screen) -> None:
    class TwoPartsError(Exception):
        def __init__(self, what: str, where: str) -> None:
            super().__init__(f"{what} in {where}")

    def work(job: int, screen: Screen) -> int:
        raise TwoPartsError("no gradient", "layer 3")

    with pytest.raises(RuntimeError, match="TwoPartsError: no gradient in layer 3") as raised:
        list(side_by_side(work, range(2), 2, screen))
    assert "in work" in "".join(raised.value.__notes__)


def test_a_process_that_ends_in_the_middle_of_a_job_is_reported_even_if_it_ends_well(screen: Screen) -> None:
    def work(job: int, screen: Screen) -> int:
        return sys.exit(0) if job == 1 else job

    with pytest.raises(ChildProcessError, match="the process that trained 1 ended with status 0"):
        list(side_by_side(work, range(4), 2, screen))


def test_what_was_done_before_an_error_stays(config: Config, two_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("seeds=3", "max_epochs=1")
    fit = nobackprop.training.run._fit

    def second_fails(run: Any, dataset: Any, group: Any, screen: Any) -> Any:
        if group.tasks[0].seed == 1:
            until((run.seed_folder(0) / "record.json").exists)
            raise OSError("No space left on device")
        return fit(run, dataset, group, screen)

    monkeypatch.setattr("nobackprop.training.run._fit", second_fails)
    with pytest.raises(OSError, match="No space left"):
        train(cfg)
    assert Record.read(folder(cfg) / "seed0" / "record.json").seed == 0
    monkeypatch.undo()
    assert [r.seed for r in train(cfg)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"was killed by SIGKILL \(out of memory\?\).*`workers`"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was killed by SIGSEGV"),
        (lambda: sys.exit(3), "ended with status 3"),
    ],
    ids=["killed", "crashed", "exited"],
)
def test_a_process_that_dies_is_reported(screen: Screen, end: Callable[[], None], message: str) -> None:
    with pytest.raises(ChildProcessError, match=message):
        list(side_by_side(lambda job, screen: end() if job == 1 else job, range(4), 2, screen))


def test_the_command_reports_a_dead_process_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        raise ChildProcessError("a process was killed")

    monkeypatch.setattr(cli, "run", run)
    monkeypatch.setattr(sys, "argv", ["nobackprop"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit, match="nobackprop: a process was killed"):
        cli.main()


def test_what_workers_have_to_say_is_shown(screen: Screen) -> None:
    def work(job: int, screen: Screen) -> None:
        screen.print(f"job {job} begins")
        screen.bar(f"bar {job}", total=10, completed=5, state="half")

    for job, _ in side_by_side(work, range(2), 2, screen):
        screen.finish(f"bar {job}")
    file = screen.bars.console.file
    assert isinstance(file, io.StringIO)
    for job in range(2):
        assert f"job {job} begins" in file.getvalue()
        assert f"bar {job} " in file.getvalue()


def start(tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """The command with two seeds on two cores, as soon as both have a checkpoint, and its processes."""
    code = "from nobackprop import quick_start; quick_start.start()\n"
    code += "import nobackprop.training.processes as w; w.cores = lambda: 2\n"
    code += "from nobackprop.cli import main; main()"
    overrides = [*SMALL, "seeds=2", "max_epochs=30", "checkpoint_minutes=0", "paths.runs=runs"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *overrides],
        cwd=tmp_path,
        env={**os.environ, "NOBACKPROP_DATA": "data"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(
        lambda: len({path.parent for path in tmp_path.glob("runs/*/checkpoints/*/*.ckpt")}) == 2,
        unless=lambda: process.poll() is not None and process.communicate(),
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, [int(pid) for pid in children]


def wait_for_the_end_of(pids: list[int]) -> None:
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds=60)


def test_ctrl_c_ends_all_workers_after_a_checkpoint(tmp_path: Path) -> None:
    process, children = start(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert len(children) == 2
    wait_for_the_end_of(children)
    assert shown.count("stopped; the same command goes on from step") == 2
    assert "Traceback" not in errors


def test_a_worker_that_is_stopped_is_told_and_the_others_write_their_checkpoints(tmp_path: Path) -> None:
    process, children = start(tmp_path)
    os.kill(children[0], signal.SIGTERM)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(
        r"^nobackprop: the process that trained lra_e_mlp_digits seed . \(./2\) was stopped by SIGTERM; the same "
        "command goes on from the last checkpoints$",
        errors,
        re.MULTILINE,
    )
    assert "Traceback" not in errors
    assert shown.count("stopped; the same command goes on from step") == 2
    wait_for_the_end_of(children)


def test_a_killed_run_ends_its_workers_and_goes_on_to_the_same_records(config: Config, tmp_path: Path) -> None:
    process, children = start(tmp_path)
    process.kill()
    process.communicate()
    wait_for_the_end_of(children)
    killed = config("seeds=2", "max_epochs=30")
    assert not list(folder(killed).glob("seed*/record.json"))
    assert len(list(folder(killed).glob("checkpoints/*/*.ckpt"))) >= 2
    train(killed)
    train(small(tmp_path / "alone", "seeds=2", "max_epochs=30", "workers=1"))
    assert same_results(tmp_path / "runs", tmp_path / "alone") == 2
