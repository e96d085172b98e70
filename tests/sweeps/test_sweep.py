"""Sweeps: what is skipped, goes on and is repeated; locks; signals; dry runs; the table."""

import errno
import fcntl
import io
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import (
    Config,
    Killed,
    at_save,
    folder,
    holders,
    raise_killed,
    run_config,
    same_results,
    shown,
    small,
    train,
    until,
)
from omegaconf import DictConfig
from rich.console import Console

from nobackprop.data import sources
from nobackprop.places import PACKAGE
from nobackprop.records import provenance
from nobackprop.sweeps import jobs, local, slurm, sweep
from nobackprop.sweeps.jobs import Job, Outcome
from nobackprop.sweeps.local import Basic, Processes
from nobackprop.sweeps.slurm import Cluster, Submitted
from nobackprop.training.run import Busy
from nobackprop.training.stopping import Stopped


@contextmanager
def training_elsewhere(cfg: DictConfig, seed: int = 0) -> Iterator[None]:
    """As if another process were training a seed: it holds the system's lock."""
    path = folder(cfg) / f"seed{seed}" / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Signals


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_a_checkpoint(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    console: Console,
    signum: signal.Signals,
    status: int,
) -> None:
    train(small(tmp_path / "alone"))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    cfg = config("checkpoint_minutes=60")
    at_save(monkeypatch, 1, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Stopped) as stopped:
        train(cfg, console)
    monkeypatch.undo()
    assert stopped.value.code == status
    assert "stopped; the same command goes on from step 100" in shown(console)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    train(cfg, console)
    assert "seed 0 (1/1): goes on from step 100" in shown(console)
    assert same_results(tmp_path / "alone", tmp_path / "runs") == 1


@pytest.mark.parametrize(("seconds", "said"), [(0.9, "goes on from step 100"), (1.1, "starts it again")])
def test_a_second_ctrl_c_does_not_wait_but_one_passed_on_twice_is_one(
    config: Config, monkeypatch: pytest.MonkeyPatch, console: Console, seconds: float, said: str
) -> None:
    def twice() -> None:
        now = time.monotonic()
        with monkeypatch.context() as context:
            context.setattr("nobackprop.training.stopping.time", SimpleNamespace(monotonic=lambda: now))
            os.kill(os.getpid(), signal.SIGINT)
            now += seconds
            os.kill(os.getpid(), signal.SIGINT)

    at_save(monkeypatch, 1, twice)
    with pytest.raises(Stopped):
        train(config("checkpoint_minutes=60"), console)
    assert f"stopped; the same command {said}" in shown(console)


def test_a_clusters_notice_writes_a_checkpoint_before_its_own_handler_has_its_turn(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As submitit does: USR2 puts the job back into the queue and exits, TERM is noted."""
    train(small(tmp_path / "alone"))
    cfg = config("checkpoint_minutes=60")
    kept: dict[int, list[str]] = {}

    def requeue(signum: int, _: Any) -> None:
        kept[signum] = [path.stem for path in folder(cfg).glob("checkpoints/*/*.ckpt")]
        raise SystemExit(-1)

    before = {s: signal.signal(s, requeue) for s in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        at_save(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        at_save(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGUSR2))
        with pytest.raises(SystemExit) as ended:
            train(cfg)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    monkeypatch.undo()
    assert ended.value.code == -1
    assert {s: sorted(names) for s, names in kept.items()} == {signal.SIGUSR2: ["000000100", "000000261"]}
    train(cfg)
    assert same_results(tmp_path / "alone", tmp_path / "runs") == 1


# Locks


def test_a_seed_that_another_process_trains_is_left_to_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("seeds=2")
    with training_elsewhere(cfg):
        with pytest.raises(Busy, match="another process is training seed 0"):
            train(cfg, wait_for_others=False)
        assert sorted(path.parent.name for path in folder(cfg).glob("*/record.json")) == ["seed1"]
    assert [r.seed for r in train(cfg, wait_for_others=False)] == [0, 1]  # the lock went with its holder


def test_what_another_process_has_trained_meanwhile_is_not_trained_again(
    config: Config, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = small(tmp_path / "elsewhere")
    train(elsewhere)
    cfg = config()
    holds = threading.Event()

    def other() -> None:
        with training_elsewhere(cfg):
            holds.set()
            until(lambda: "waits" in shown(console))
            shutil.copytree(folder(elsewhere), folder(cfg), dirs_exist_ok=True)

    thread = threading.Thread(target=other)
    thread.start()
    assert holds.wait(60)
    monkeypatch.setattr("nobackprop.training.run._fit", lambda *_: pytest.fail("was trained again"))
    assert [r.seed for r in train(cfg, console)] == [0]
    thread.join()
    lock = folder(cfg) / "seed0" / ".lock"
    assert f"waits: another process is training seed 0; if it is no more, delete {lock}\n" in shown(console)


def test_a_busy_job_comes_last(config: Config, console: Console) -> None:
    first, second = config("rule=bp"), config("rule=dfa")
    held, done = threading.Event(), folder(second) / "seed0" / "record.json"

    def other() -> None:
        with training_elsewhere(first):
            held.set()
            until(done.exists)

    thread = threading.Thread(target=other)
    thread.start()
    assert held.wait(60)
    outcomes = sweep.run([Job("a", first), Job("b", second)], Basic(), console)
    thread.join()
    assert [o.state for o in outcomes] == ["finished", "finished"]
    order = re.findall(r"^\d/2 (\w): (comes back|finished)", shown(console), re.MULTILINE)
    assert order == [("a", "comes back"), ("b", "finished"), ("a", "finished")]
    assert re.findall(r"^\d/2 (\w): .*; about 0:00:\d\d for the other 1$", shown(console), re.MULTILINE) == ["a"]


# Sweeps


def test_a_sweep_skips_repeats_goes_on_and_tells(
    config: Config, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [
        Job("good", config("rule=bp", "seeds=2")),
        Job("wrong", config("rule=mdfa", "init=orthogonal")),
        Job("breaks", config("rule=fa")),
        Job("killed", config("rule=dfa", "checkpoint_minutes=0")),
    ]
    at_save(monkeypatch, 4, raise_killed)
    with pytest.raises(Killed):
        train(jobs[3].config)
    monkeypatch.undo()

    def broken(*_: Any) -> None:
        raise RuntimeError("no such thing\nin detail")

    monkeypatch.setattr("nobackprop.rules.fa.FA.grads", broken)
    with monkeypatch.context() as patched:
        patched.setattr("nobackprop.training.build._try_step", lambda *_: None)
        outcomes = sweep.run(jobs, Basic(), console)
    text = shown(console)
    assert [o.state for o in outcomes] == ["finished", "failed", "failed", "finished"]
    assert outcomes[2].reason == "RuntimeError: no such thing"
    assert text.index("raise RuntimeError") < text.index("4/4 killed: starts; was interrupted, goes on from step 261")
    assert "2/4 wrong: failed: rule MDFA needs non-negative weights" in text
    assert "2 finished, 2 failed" in text
    assert re.search(r"breaks +│ failed +│ +│ RuntimeError: no such thing", text)
    monkeypatch.undo()
    again = Console(width=250, file=io.StringIO())
    outcomes = sweep.run([jobs[0], *jobs[2:]], Basic(), again)
    assert [o.state for o in outcomes] == ["recorded", "finished", "recorded"]
    assert "1/3 good: is recorded already" in shown(again)
    assert "2/3 breaks: starts; failed before (in detail), is tried again" in shown(again)
    assert not list(folder(jobs[2].config).glob("error*"))
    best = [max(e["val/accuracy"] or 0 for e in r.epochs) for r in outcomes[0].records]
    assert outcomes[0].objective == pytest.approx(sum(best) / 2)
    assert min(best) > 0.5
    diverged = outcomes[0].records[0].model_copy(update={"diverged_epoch": 2})
    assert Outcome("finished", records=[diverged, outcomes[0].records[1]]).objective == pytest.approx(best[1] / 2)
    assert Outcome("failed").objective is None


@pytest.mark.parametrize(
    ("error", "details"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"\S+/runs can't be used for records, .*: No space left .*"),
        (ChildProcessError("a process that trained a seed was killed"), "a process that trained a seed was killed"),
        (ValueError("a slip"), r'Traceback .*(?s:.*)File ".*(?s:.*)ValueError: a slip\n'),
    ],
)
def test_a_job_tells_what_went_wrong_and_of_a_fault_where(
    config: Config, console: Console, monkeypatch: pytest.MonkeyPatch, error: Exception, details: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(jobs, "train", fail)
    outcome = jobs.attempt(Job("", config()), console, wait_for_others=True)
    assert outcome.state == "failed"
    assert re.fullmatch(details, outcome.details)


def test_a_job_whose_folder_cannot_be_made_fails_before_it_is_trained(config: Config, console: Console) -> None:
    (outcome,) = sweep.run([Job("a", config("paths.runs=/dev/null/runs"))], Basic(), console)
    assert outcome.reason.startswith("/dev/null can't be used for records, weights and checkpoints: Not a directory")
    assert "1/1 a: failed: /dev/null can't be used" in shown(console)


def test_a_dry_run_writes_nothing_and_estimates_by_earlier_records(
    config: Config, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cut_short in ([], ["max_steps=10"]):  # which says as much of a step
        cfg = config("rule=bp", *cut_short)
        (record,) = train(cfg)
        wall = 60.0 * record.steps / (2 * 161)
        record.model_copy(update={"wall_s": wall}).write(folder(cfg) / "seed0" / "record.json")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("nobackprop.training.run._fit", lambda *_: pytest.fail("was trained"))
    jobs = [
        Job("recorded", config("rule=bp")),
        Job("more", config("rule=bp", "seeds=3", "max_epochs=4")),
        Job("shorter", config("rule=bp", "l2=0.1", "max_steps=161")),
        Job("other", config("rule=dfa")),
        Job("wrong", config("rule=mdfa", "init=orthogonal")),
    ]
    outcomes = sweep.run(jobs, Basic(), console, dry_run=True)
    assert [o.state for o in outcomes] == ["recorded", "queued", "queued", "queued", "failed"]
    text = shown(console)
    assert re.search(r"more +│ 0 recorded, 3 to run +│ +│ 0:06:00", text)  # 3 seeds of 4 epochs of 30 s
    assert re.search(r"shorter +│ 0 recorded, 1 to run +│ +│ 0:00:30", text)
    assert re.search(r"other .*unknown", text)
    assert "3 of 5 would run, 1 at once: roughly 0:06:30 by earlier records, with one seed of a run after" in text
    assert "; no record tells for 1 of them" in text
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_tells_which_records_it_can_not_use(config: Config, console: Console) -> None:
    cfg = config("rule=bp", "max_epochs=1")
    train(cfg)
    path = folder(cfg) / "seed0" / "record.json"
    path.write_bytes(path.read_bytes().replace(b'"batch_size":8', b'"batch_size":0'))
    (outcome,) = sweep.run([Job("other", config("rule=dfa"))], Basic(), console, dry_run=True)
    assert outcome.state == "queued"
    assert f"no estimate is made from what is damaged: {path} is damaged (its checksum" in shown(console)


def test_labels_and_reasons_are_shown_as_they_are(config: Config, console: Console) -> None:
    jobs = [Job("logger.tags=[a,b,:x:]\x1b[31m", config())]
    console.print(sweep.table(jobs, [Outcome("failed", "no memory at [/data/x]")]))
    assert re.search(r"logger\.tags=\[a,b,:x:\]\\x1b\[31m .* no memory at \[/data/x\]", shown(console))


def test_ctrl_c_ends_a_sweep_with_a_table(config: Config, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job("first", config("rule=bp")), Job("second", config("rule=dfa")), Job("third", config("rule=fa"))]
    at_save(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped) as stopped:
        sweep.run(jobs, Basic(), console)
    assert stopped.value.code == 130
    assert "1 finished, 2 stopped" in shown(console)
    assert "the same command goes on" in shown(console)


def test_processes_train_the_same_and_one_that_is_killed_harms_no_other(
    config: Config, tmp_path: Path, console: Console
) -> None:
    rules = ("bp", "dfa", "mdfa")
    for rule in rules:
        train(small(tmp_path / "alone", f"rule={rule}", "seeds=2"))
    jobs = [Job(rule, config(f"rule={rule}", "seeds=2")) for rule in rules]
    endless = config("rule=fa", "max_epochs=100000", "checkpoint_minutes=0")

    def kill() -> None:
        until(lambda: list(folder(endless).glob("checkpoints/*/*.ckpt")))
        (pid,) = holders(folder(endless) / "seed0" / ".lock")
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    outcomes = sweep.run([Job("endless", endless), *jobs], Processes(), console)
    thread.join()
    assert [o.state for o in outcomes] == ["failed", "finished", "finished", "finished"]
    assert outcomes[0].reason == "its process was killed by SIGKILL (out of memory?)"
    assert same_results(tmp_path / "alone", tmp_path / "runs") == 6


def test_a_process_trains_job_after_job_with_the_images_that_the_sweep_has_read(
    config: Config, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(job: Job, *_: object) -> Outcome:
        return Outcome("failed", f"{os.getpid()}", f"{sources._load.cache_info().misses}")

    sources._load.cache_clear()
    monkeypatch.setattr("nobackprop.sweeps.local.cores", lambda: 2)
    monkeypatch.setattr("nobackprop.sweeps.local.attempt", attempt)  # which forks have, too
    jobs = {i: Job(str(i), config(f"l2=0.{i}")) for i in range(6)}
    outcomes = dict(Processes().run(jobs, lambda i, text: None, console, wait_for_others=False))
    assert sorted(outcomes) == [*range(6)]
    pids = {outcome.reason for outcome in outcomes.values()}
    assert len(pids) == 2
    assert str(os.getpid()) not in pids
    assert {outcome.details for outcome in outcomes.values()} == {"1"}  # read once, before the forks


def test_a_job_whose_images_are_missing_says_so_and_harms_no_other(
    config: Config, tmp_path: Path, console: Console
) -> None:
    lost = config("dataset=folder", "dataset.name=birds", f"dataset.source.root={tmp_path}/none", "arch=allconv_224")
    outcomes = sweep.run([Job("lost", lost), Job("other", config())], Processes(), console)
    assert [o.state for o in outcomes] == ["failed", "finished"]
    assert str(tmp_path / "none") in outcomes[0].reason


def test_jobs_that_no_fork_can_do_are_done_all_the_same(config: Config, tmp_path: Path, console: Console) -> None:
    how = ("threads=2", "seeds=2", "max_epochs=1")
    train(small(tmp_path / "alone", *how))
    assert sweep.run([Job("", config(*how))], Processes(), console)[0].state == "finished"
    assert same_results(tmp_path / "alone", tmp_path / "runs") == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [((), True), (("workers=1",), True), (("workers=2",), False), (("threads=2",), False), (("trainer=ddp",), False)],
)
def test_a_fork_does_a_job_of_one_thread_and_one_process(
    config: Config, overrides: Sequence[str], expected: bool
) -> None:
    assert local._can_fork(Job("", config("trainer.accelerator=cpu", *overrides))) == expected


def test_one_process_that_is_stopped_is_one_job_that_failed(
    config: Config, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, other = config("rule=bp", "max_epochs=100000", "checkpoint_minutes=60"), config("rule=dfa")
    lock = folder(stopped) / "seed0" / ".lock"

    def stop() -> None:
        until((lock.parent / ".holder").exists)
        time.sleep(1)
        (pid,) = holders(lock)
        os.kill(pid, signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    monkeypatch.setattr("nobackprop.sweeps.local.cores", lambda: 1)
    outcomes = sweep.run([Job("stopped", stopped), Job("other", other)], Processes(), console)
    thread.join()
    assert [o.state for o in outcomes] == ["failed", "finished"]
    assert outcomes[0].reason == "its process was stopped by SIGTERM"
    assert len(list(folder(stopped).glob("checkpoints/*/*.ckpt"))) == 1
    assert re.match("was interrupted, goes on from step", sweep.look(Job("stopped", stopped)).before)


def test_ctrl_c_ends_the_processes_too_after_a_checkpoint(config: Config, tmp_path: Path, console: Console) -> None:
    cfg = config("rule=bp", "max_epochs=100000", "checkpoint_minutes=60")

    def interrupt() -> None:
        until(lambda: holders(folder(cfg) / "seed0" / ".lock"))
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped):
        sweep.run([Job("endless", cfg)], Processes(), console)
    thread.join()
    assert not holders(folder(cfg) / "seed0" / ".lock")
    assert len(list(folder(cfg).glob("checkpoints/*/*.ckpt"))) == 1


def test_a_launcher_has_its_old_name_too(config: Config) -> None:
    assert config("launcher=joblib").launcher == config("launcher=processes").launcher


def test_no_more_processes_than_cores(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nobackprop.sweeps.local.cores", lambda: 4)
    jobs = [Job("", config())] * 9
    assert [Processes(workers).at_once(jobs) for workers in (None, 2, 64)] == [4, 2, 4]
    assert Processes().at_once([Job("", config("threads=2"))] * 9) == 2
    assert Processes().at_once(jobs[:1]) == 1
    for launcher in (Processes(), Cluster("local")):
        several = [[Job("", config(f"threads={t}", f"workers={w}"))] * 9 for t, w in ((4, "null"), (1, 4), (2, 2))]
        assert [launcher.at_once(jobs) for jobs in several] == [1, 1, 1]


def test_jobs_of_other_seeds_of_a_run_are_other_jobs(
    config: Config, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the run's folder in common."""
    few, more = Job("few", config()), Job("more", config("seeds=3"))
    jobs.note(few, Outcome("failed", details="no luck"))
    jobs.note(more, Outcome("finished"))
    assert "no luck" in sweep.look(few).before
    assert not sweep.look(more).before
    executor = SimpleNamespace(map_array=lambda _, jobs: [SimpleNamespace(job_id=f"12_{i}") for i in range(len(jobs))])
    monkeypatch.setattr(Cluster, "_executor", lambda *_: executor)
    monkeypatch.setattr(slurm, "_queued_jobs", lambda: {"12_0"})
    said: list[str] = []
    for job in (few, few, more):
        cluster = Cluster("slurm", wait=False)
        ((_, outcome),) = cluster.run({0: job}, lambda _, text: said.append(text), console, wait_for_others=True)
        said.append(outcome.reason)
    assert said == ["is submitted as job 12_0", "as job 12_0", "as job 12_0 of an earlier sweep", *said[:2]]


def test_jobs_of_a_cluster_go_on_when_the_sweep_is_stopped_and_what_it_refuses_is_told(
    config: Config, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("sbatch: error: invalid partition specified: typo")

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    jobs = [Job("a", config()), Job("b", config("rule=fa"))]
    monkeypatch.setattr(slurm, "_queued_jobs", set)
    monkeypatch.setattr(Cluster, "_executor", lambda *_: SimpleNamespace(map_array=refuse))
    with pytest.raises(ValueError, match="launcher: sbatch: error: invalid partition specified: typo"):
        sweep.run(jobs, Cluster("slurm"), console)
    executor = SimpleNamespace(map_array=lambda _, jobs: [SimpleNamespace(job_id=f"7_{i}") for i in range(len(jobs))])
    monkeypatch.setattr(Cluster, "_executor", lambda *_: executor)
    monkeypatch.setattr(Submitted, "over", lambda _: False)
    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(Stopped):
        sweep.run(jobs, Cluster("slurm"), console)
    assert [f"queued as job 7_{i}, which goes on (scancel ends it)" in shown(console) for i in range(2)] == [True] * 2
    assert "2 queued" in shown(console)


def test_a_stack_goes_on_from_its_checkpoint_when_seeds_are_added(
    config: Config, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seeds in ("seeds=2", "seeds=[2]"):
        train(small(tmp_path / "alone", "stack=true", seeds))
    at_save(monkeypatch, 4, raise_killed)
    with pytest.raises(Killed):
        train(config("stack=true", "seeds=2", "checkpoint_minutes=0"))
    monkeypatch.undo()
    job = Job("more", config("stack=true", "seeds=3"))
    assert sweep.look(job).before == "was interrupted, goes on from step 261"
    assert not sweep.look(Job("apart", config("stack=false", "seeds=3"))).before  # it would start them again
    assert not sweep.look(Job("other", config("stack=true", "seeds=[1,2]"))).before
    train(job.config, console)
    assert "seed 0,1 (1/2): goes on from step 261" in shown(console)
    assert same_results(tmp_path / "alone", tmp_path / "runs") == 3
    assert not list(folder(job.config).glob("checkpoints/*"))


def test_a_cluster_that_does_not_answer_for_a_while_has_not_lost_its_jobs(
    config: Config, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 7; echo Unable to contact slurm controller >&2; exit $(cat status)\n")
    squeue.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(Submitted, "queued", (0.0, set()))
    monkeypatch.setattr(Submitted, "POLL_S", 0)
    handle = SimpleNamespace(job_id="7", paths=SimpleNamespace(result_pickle=tmp_path / "none"))
    job, over = Submitted(handle, slurm=True), []
    other = Submitted(SimpleNamespace(job_id="8", paths=handle.paths), slurm=True)
    for status in (1, 1, 0):
        (tmp_path / "status").write_text(str(status))
        over.append((job.over(), other.over()))
    assert over == [(False, False), (False, False), (False, True)]

    def say(i: int, text: str) -> None:
        pytest.fail(text)

    (tmp_path / "status").write_text("1")
    assert list(Cluster("slurm").run({}, say, console, wait_for_others=True)) == []
    with pytest.raises(ValueError, match=r"squeue does not answer \(Unable to contact slurm controller\): try again"):
        list(Cluster("slurm").run({0: Job("", config())}, say, console, wait_for_others=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launcher=processes", "launcher.workers=0"], "launcher.workers: Input should be greater than 0, got 0"),
        (["launcher=slurm", "+launcher.time=3"], "launcher: unknown key time; choose from: executor"),
        (["launcher=slurm", "launcher.options=a100"], "launcher.options: Input should be an object, got 'a100'"),
        (["launcher=slurm", "launcher.hours=long"], "launcher.hours: Input should be a valid number"),
        (["launcher=slurm", "launcher.hours=0"], "launcher.hours: Input should be greater than 0, got 0"),
        (["launcher=slurm", "launcher.cpus=0"], "launcher.cpus: Input should be greater than 0, got 0"),
        (["launcher=slurm", "launcher.gpus=-1"], "launcher.gpus: Input should be greater than or equal to 0, got -1"),
    ],
)
def test_a_launchers_keys_are_checked(config: Config, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        jobs.launcher_of(config(*overrides))


def test_a_sweep_is_tried_here_with_the_keys_of_the_cluster(config: Config) -> None:
    given = ["launcher.partition=gpu", "launcher.wait=false", "launcher.options={constraint:a100}"]
    executors: dict[str, Any] = {"slurm": "slurm", "slurm_local": "local"}
    for name, executor in executors.items():
        made = jobs.launcher_of(config(f"launcher={name}", *given))
        assert made == Cluster(executor, partition="gpu", wait=False, options={"constraint": "a100"})


def test_a_copy_of_the_source_knows_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "source_state", lambda: ("abc", True))
    path = slurm.snapshot(tmp_path / "source")

    def files(folder: Path) -> set[Path]:
        return {f.relative_to(folder) for f in folder.rglob("*") if f.is_file() and f.parent.name != "__pycache__"}

    assert files(path / "nobackprop") == files(PACKAGE) | {Path("source.json")}
    monkeypatch.setattr(provenance, "PACKAGE", path / "nobackprop")
    monkeypatch.setattr(provenance, "source_state", provenance.source_state.__wrapped__)
    assert provenance.source_state() == ("abc", True)


@pytest.mark.parametrize(("given", "expected"), [("null", 1), ("2", 2)])
def test_a_job_beside_others_keeps_its_seeds_in_one_process(given: str, expected: int) -> None:
    job = jobs.Job("", run_config(f"workers={given}"))
    assert local.beside_others(job).config.workers == expected
    assert job.config.workers == (None if given == "null" else 2)


def test_images_are_read_once_for_all_forks() -> None:
    read: list[str] = []

    @dataclass(frozen=True)
    class Stub:
        name: str

        def load(self) -> SimpleNamespace:
            read.append(self.name)
            if self.name == "a":
                raise OSError("a source that fails is left to its jobs")
            return SimpleNamespace(fingerprint="")

    every: Any = [SimpleNamespace(run=SimpleNamespace(source=Stub(name))) for name in "abcabc"]
    local._read_images(every)
    assert read == ["a", "b", "c"]


def test_what_a_job_draws_at_random_does_not_depend_on_the_jobs_before() -> None:
    class Drawing:
        config: Any = None

        @property
        def run(self) -> None:
            raise RuntimeError(float(torch.rand(())))

    drawing: Any = Drawing()
    first, second = (jobs.attempt(drawing, Console(quiet=True), False).details for _ in range(2))
    assert first == second
    assert "RuntimeError: 0." in first
