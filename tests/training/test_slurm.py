"""A real SLURM of one node: launcher=slurm as an array, with jobs that are put back and killed; trainer=ddp by srun."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, folder, holders, same_results, small, train, until
from rich.console import Console
from test_ddp import assert_trained_as_alone, command

from nobackprop.records import provenance
from nobackprop.records.record import Record
from nobackprop.sweeps import sweep
from nobackprop.sweeps.jobs import Job
from nobackprop.sweeps.slurm import Cluster, Submitted

SCRIPT = ROOT / "scripts" / "slurm_one_node.sh"
pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if os.getuid() != 0:
        pytest.skip("SLURM's daemons need root here")
    if not all(shutil.which(command) for command in ("slurmctld", "slurmd", "munged", "srun")):
        pytest.skip("no SLURM: scripts/slurm_one_node.sh install")
    state = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPT, "start", state], check=True, timeout=60)
    os.environ["SLURM_CONF"] = f"{state}/slurm.conf"
    yield
    subprocess.run([SCRIPT, "stop", state], check=True, timeout=60)
    del os.environ["SLURM_CONF"]


def scontrol(*args: str) -> str:
    return subprocess.run(["scontrol", *args], check=True, capture_output=True, text=True, timeout=60).stdout


def test_a_sweep_on_a_cluster_loses_nothing(slurm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four jobs: one gets USR2, as before a time limit; one is killed without a trace; two are left alone."""
    monkeypatch.setattr(Submitted, "POLL_S", 2.0)
    long = ["max_epochs=100000", "checkpoint_minutes=0"]
    rules = {"interrupted": ["rule=bp", "max_epochs=40", "checkpoint_minutes=0"], "killed": ["rule=fa", *long]}
    rules |= {rule: [f"rule={rule}", "seeds=2"] for rule in ("dfa", "mdfa")}
    runs = tmp_path / "runs"
    jobs = [Job(name, small(runs, *overrides)) for name, overrides in rules.items()]
    for name, overrides in rules.items():
        if name != "killed":
            train(small(tmp_path / "alone", *overrides))
    console = Console(file=io.StringIO(), width=250)
    troubles: list[BaseException] = []
    over = threading.Event()

    def trained(job: Job) -> str:
        """The cluster's name of a job, once it has written a checkpoint."""
        until(lambda: list(folder(job.config).glob("checkpoints/*/*.ckpt")), over.is_set)
        (note,) = folder(job.config).glob("job_*.txt")
        return note.read_text()

    def disturb() -> None:
        try:
            first = trained(jobs[0])
            with suppress(
                subprocess.TimeoutExpired
            ):  # seeing the job go, scancel would signal it again when it is back
                subprocess.run(["scancel", "--signal=USR2", first], timeout=3)
            subprocess.run(["scancel", "--signal=KILL", "--full", trained(jobs[1])], check=True)
            until(lambda: "Restarts=1" in scontrol("show", "job", first), over.is_set, pause=0.2)
            raw = scontrol("-o", "show", "job", first).split()[0].removeprefix("JobId=")
            until(lambda: "JobState=PENDING" in scontrol("show", "job", first), over.is_set, pause=0.2)
            scontrol("update", f"JobId={raw}", "StartTime=now")  # SLURM lets a job wait two minutes
        except BaseException as e:
            troubles.append(e)
            subprocess.run(["scancel", "--user=root"])  # so that the sweep ends

    thread = threading.Thread(target=disturb)
    thread.start()
    outcomes = sweep.run(jobs, Cluster("slurm", memory_gb=1), console)
    over.set()
    thread.join()
    states = dict(zip(rules, [outcome.state for outcome in outcomes], strict=True))
    assert states == {"interrupted": "finished", "killed": "failed", "dfa": "finished", "mdfa": "finished"}
    assert not troubles
    assert "ended without a result (killed? out of memory?); its log: " in outcomes[1].reason
    assert not list(folder(jobs[1].config).glob("*/record.json"))
    (log,) = runs.glob(".submitit/*/*_0/*_0_0_log.out")
    assert "goes on from step" in log.read_text()
    assert same_results(tmp_path / "alone", runs) == 5
    record = Record.read(folder(jobs[2].config) / "seed0" / "record.json")
    assert (record.commit, record.dirty) == provenance.source_state()  # though it ran from a copy
    assert "_submit" not in record.command


def test_submit_and_leave(slurm: None, tmp_path: Path) -> None:
    """The command ends; the same one does not submit what is in the queue, and later finds it recorded."""
    jobs = [Job("a", small(tmp_path, "rule=bp"))]
    console = Console(file=io.StringIO(), width=250)
    for said in ("is submitted as job", "of an earlier sweep"):
        (outcome,) = sweep.run(jobs, Cluster("slurm", memory_gb=1, wait=False), console)
        assert outcome.state == "queued"
        assert isinstance(console.file, io.StringIO)
        assert said in console.file.getvalue()
    until(lambda: list(tmp_path.glob("*/seed0/record.json")))
    assert [o.state for o in sweep.run(jobs, Cluster("slurm"), console)] == ["recorded"]


def test_local_jobs_behave_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """launcher=slurm_local needs no SLURM."""
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    train(small(tmp_path / "alone", "max_epochs=40"))
    jobs = [Job("a", small(tmp_path / "runs", "max_epochs=40", "checkpoint_minutes=0"))]

    over = threading.Event()

    def interrupt() -> None:
        until(lambda: list(folder(jobs[0].config).glob("checkpoints/*/*.ckpt")), over.is_set)
        (pid,) = holders(folder(jobs[0].config) / "seed0" / ".lock")
        os.kill(pid, signal.SIGUSR2)

    thread = threading.Thread(target=interrupt)
    thread.start()
    (outcome,) = sweep.run(jobs, Cluster("local"), Console(quiet=True))
    over.set()
    thread.join()
    assert outcome.state == "finished"
    (log,) = (tmp_path / "runs").glob(".submitit/*/*/*_0_log.out")
    assert "goes on from step" in log.read_text()
    assert same_results(tmp_path / "alone", tmp_path / "runs") == 1


SRUN = ["srun", "--ntasks=2", "--ntasks-per-node=2", "--mem=1G", sys.executable, "-m"]


def test_a_clusters_tasks_train_in_parallel_as_one_process_does(slurm: None, tmp_path: Path) -> None:
    overrides = ["rule=mdfa", "seeds=2", "diagnostics=alignment"]
    ended = subprocess.run(command(*overrides, launcher=SRUN), cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr  # of the worst task
    assert ended.stdout.count("records and weights: runs/mdfa_mlp_digits") == 1
    assert_trained_as_alone(tmp_path / "runs", tmp_path / "alone", overrides)


def test_a_mistake_of_all_tasks_is_told_once(slurm: None, tmp_path: Path) -> None:
    for wrong, told in {"batch_size=25": "batch_size is 25: write a multiple of 2", "rule.beta=0": "beta is 0"}.items():
        ended = subprocess.run(command(wrong, launcher=SRUN), cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 1
        assert ended.stderr.count("nobackprop: ") == 1
        assert told in ended.stderr
        assert "Traceback" not in ended.stderr
