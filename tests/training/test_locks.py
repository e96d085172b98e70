"""Locks on seeds: who has one is told, what a killed process left is removed, and what another one writes is not."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import get_native_id
from typing import Any

import pytest
from conftest import Config, folder, interrupt, shown, train
from filelock import FileLock
from omegaconf import DictConfig
from rich.console import Console

import nobackprop.training.run
from nobackprop.records import files
from nobackprop.sweeps import sweep
from nobackprop.sweeps.jobs import Job
from nobackprop.sweeps.local import Basic
from nobackprop.training import locks
from nobackprop.training.run import Busy


@contextmanager
def held_by(cfg: DictConfig, who: str | None, hours: float = 0) -> Iterator[Path]:
    """As if another process had the lock of seed 0 for so long, and had noted who it is; gives the lock."""
    seed = folder(cfg) / "seed0"
    seed.mkdir(parents=True)
    with FileLock(seed / ".lock"):
        if who is not None:
            (seed / ".holder").write_text(who)
            since = time.time() - 3600 * hours
            os.utime(seed / ".holder", (since, since))
        yield seed / ".lock"


def test_who_trains_a_seed_is_told_and_that_one_may_delete_a_lost_machines_lock(config: Config) -> None:
    cfg = config()
    with held_by(cfg, "process 812 on node7", hours=2) as lock, pytest.raises(Busy) as told:
        train(cfg, wait_for_others=False)
    assert str(told.value).startswith("process 812 on node7 has been training seed 0 for 2:00:0")
    assert str(told.value).endswith(f" hours; if it is no more, delete {lock}")


def test_a_lock_that_a_lost_machine_left_can_be_deleted(config: Config, console: Console) -> None:
    cfg = config("max_epochs=1")
    with held_by(cfg, "process 812 on node7") as lock:
        lock.unlink()
        assert len(train(cfg, console)) == 1
    assert "waits" not in shown(console)


@pytest.mark.parametrize("note", [None, "", "\0\0", "process of mine"])
def test_a_lock_whose_holder_is_not_known_is_told_all_the_same(config: Config, note: str | None) -> None:
    cfg = config()
    with held_by(cfg, note) as lock, pytest.raises(Busy) as told:
        train(cfg, wait_for_others=False)
    assert str(told.value) == f"another process is training seed 0; if it is no more, delete {lock}"


def test_what_a_run_waits_for_is_told_again(config: Config, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bored(Exception):
        pass

    def sleep(_: float) -> None:
        if shown(console).count("waits:") == 3:
            raise Bored

    cfg = config()
    monkeypatch.setattr(nobackprop.training.run, "TELL_AGAIN_S", 0.01)
    monkeypatch.setattr("nobackprop.training.run.time.sleep", sleep)
    with held_by(cfg, "process 812 on node7", hours=2), pytest.raises(Bored):
        train(cfg, console)
    assert "seed 0 (1/1): waits: process 812 on node7 has been training seed 0 for 2:00:0" in shown(console)


def test_a_process_notes_itself_while_it_trains(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, notes = config("max_epochs=1"), []
    fit = nobackprop.training.run._fit

    def look(*args: Any) -> Any:
        notes.append((folder(cfg) / "seed0" / ".holder").read_text())
        return fit(*args)

    monkeypatch.setattr(nobackprop.training.run, "_fit", look)
    train(cfg)
    assert notes == [f"process {os.getpid()} on {platform.node()}"]
    assert not (folder(cfg) / "seed0" / ".holder").exists()


def test_one_of_several_locks_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "seed1").mkdir()
    with FileLock(tmp_path / "seed1" / ".lock"), ExitStack() as held:
        assert "is training seed 1; if it is no more" in locks.take(tmp_path, [0, 1], held)
        with ExitStack() as other:
            assert not locks.take(tmp_path, [0], other)


# What killed processes leave


def dead() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def unfinished(path: Path, pid: int, node: str = platform.node(), hours: float = 0) -> Path:
    left = path.with_name(f".{path.name}.{node}.{pid}")
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"half")
    since = time.time() - 3600 * hours
    os.utime(left, (since, since))
    return left


def test_what_killed_processes_left_is_removed_by_the_next_command(config: Config, console: Console) -> None:
    starts: list[Callable[[], Any]] = [
        lambda: train(config("max_epochs=1")),
        lambda: sweep.run([Job("a", config("max_epochs=1"))], Basic(), console),
    ]
    run = folder(config("max_epochs=1"))
    for start in (*starts, *starts):  # first something is trained, then it is recorded
        left = [
            unfinished(run / "error_1.txt", dead()),
            unfinished(run / "job_1.txt", 1, "elsewhere", hours=25),
            unfinished(run / "seed0" / "record.json", dead()),
            unfinished(run / "seed0" / "best.pt", dead(), "elsewhere"),  # we have the lock
        ]
        (run / "seed0" / ".holder").write_text("process 1 on elsewhere")
        (run / "checkpoints" / "empty").mkdir(parents=True)
        (run / "seed0" / ".own.1").mkdir(exist_ok=True)  # a folder is none of ours
        used = [
            unfinished(run / "error_2.txt", os.getpid()),
            unfinished(run / "error_3.txt", 1, "elsewhere", hours=23),
            run / ".hidden.txt",
        ]
        used[-1].touch()
        start()
        assert [path for path in (*left, run / "seed0" / ".holder", run / "checkpoints") if path.exists()] == []
        assert [path for path in used if not path.exists()] == []


def test_what_another_process_is_writing_is_left_alone(config: Config) -> None:
    cfg = config("max_epochs=1")
    train(cfg)
    path = unfinished(folder(cfg) / "seed0" / "best.pt", dead())
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n print(flush=True)\n sys.stdin.read()"
    command = [sys.executable, "-c", code, str(path.with_name(".lock"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        train(cfg)
        assert path.exists()
        other.communicate(b"")
    train(cfg)
    assert not path.exists()


def test_a_half_written_checkpoint_is_removed_when_the_run_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    left = unfinished(interrupt(cfg)[-1].with_name("000000322.ckpt"), dead(), "elsewhere")
    monkeypatch.setattr(nobackprop.training.run, "trainer", lambda *_, **__: pytest.fail("enough"))
    with pytest.raises(pytest.fail.Exception):
        train(cfg)
    assert not left.exists()


def test_the_name_of_an_unfinished_file_tells_who_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.extend(files.unfinished(tmp_path)))
    files.write_atomically(tmp_path / "a.txt", b"a")
    assert {path.name for path in seen} == {f".a.txt.{get_native_id()}.{platform.node()}.{os.getpid()}"}
    assert os.listdir(tmp_path) == ["a.txt"]


def test_threads_of_one_process_write_one_file_each_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "a.txt", set()

    def slow(_: object) -> None:
        time.sleep(0.01)  # meanwhile the others begin
        if path.exists():
            seen.add(path.read_bytes())

    monkeypatch.setattr(os, "fsync", slow)
    contents = [bytes([i]) * 9 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: files.write_atomically(path, content), contents))
    assert seen <= {*contents}
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_may_not_be_written_can_be_looked_at(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("max_epochs=1")
    first = train(cfg)
    left = unfinished(folder(cfg) / "seed0" / "best.pt", dead())

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert train(cfg) == first
    assert left.exists()
