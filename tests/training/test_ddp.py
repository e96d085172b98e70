"""Data-parallel runs: what two processes train together is what one trains alone."""

import atexit
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, small, train, until
from filelock import FileLock, Timeout
from omegaconf import DictConfig
from torch import Tensor

from nobackprop.core.layers import Shape
from nobackprop.core.network import Network
from nobackprop.core.rule import Batch, Grads
from nobackprop.data import batches
from nobackprop.data.batches import EvalBatches, TrainBatches, task
from nobackprop.data.sources import Dataset
from nobackprop.mistakes import Mistake
from nobackprop.records.files import write_atomically
from nobackprop.records.record import Record
from nobackprop.rules.bp import BP
from nobackprop.training import checkpoints
from nobackprop.training.build import prepare
from nobackprop.training.checkpoints import ResumePoint
from nobackprop.training.ddp import SameWeights, connect, start

OWN = ["batch_size=64", "optimizer=sgd", "optimizer.lr=0.05"]
DDP = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]


def config(folder: Path, *overrides: str) -> DictConfig:
    """A small run on digits: 20 mini-batches an epoch."""
    return small(folder, *OWN, *overrides)


@dataclass(frozen=True)
class Noisy(BP):
    """BP whose first bias moves by noise: one number of each sample's, and one for all of them."""

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        return {"each": (samples, net.units(1)), "all": (net.units(1),)}

    def grads(self, net: Network, w: Mapping[str, Tensor], batch: Batch) -> Grads:
        g, logits = super().grads(net, w, batch)
        weight = batch.y[:, :1]  # of a sample's noise, so that it matters whose it is
        return g | {"b1": g["b1"] + (weight * batch.noise["each"]).mean(0) + batch.noise["all"]}, logits


NOISY = [f"rule._target_={__name__}.Noisy", "~rule.beta", "~rule.gamma", "~rule.learn_E", "~rule.difference"]
RUNS = {
    "sum": ["update=sum", "l2=0.001", "optimizer.lr=0.001", "schedule=cosine"],
    "unit_norm": ["update=unit_norm", "rule.gamma=0.5", "dataset.flip=true", "dataset.crop=1"],
    "noisy": NOISY,
}


def _train_all(folder: Path) -> None:
    """In each of two processes: every run, and the first one again from a checkpoint in its second epoch."""
    batches.CHUNK_STEPS = 8
    save = ResumePoint.save
    copies: dict[int, tuple[str, bytes]] = {}

    def save_and_copy(self: ResumePoint, trainer: Any) -> None:
        save(self, trainer)
        last = checkpoints.files(self.folder)[-1]
        copies[trainer.lightning_module.steps] = f"{self.folder.name}/{last.name}", last.read_bytes()

    for name, overrides in RUNS.items():
        train(config(folder / name, *DDP, *overrides))
    ResumePoint.save = save_and_copy
    train(config(folder / "whole", *DDP, "checkpoint_minutes=0"))
    ResumePoint.save = save
    resumed = config(folder / "resumed", *DDP)
    name, content = copies[28]
    write_atomically(prepare(resumed).folder / "checkpoints" / name, content)
    torch.distributed.barrier()
    train(resumed)


def only(folder: Path, seed: int = 0) -> Path:
    (path,) = folder.glob(f"*/seed{seed}/record.json")
    return path


def weights(record: Path) -> dict[str, Tensor]:
    return torch.load(record.with_name("best.pt"), weights_only=True)["weights"]


def close(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value == pytest.approx(b[key], rel=1e-4, abs=1e-4), key


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two processes."""
    folder = tmp_path_factory.mktemp("together")
    start(_train_all, 2, folder)
    return folder


def assert_trained_as_alone(together: Path, alone: Path, overrides: list[str]) -> None:
    """The same run by two processes, in `together`, and by this one, in `alone`."""
    for expected in train(config(alone, *overrides)):
        path = only(together, expected.seed)
        record = Record.read(path)
        assert (record.signature, record.steps, record.data) == (expected.signature, expected.steps, expected.data)
        assert (record.machine.devices, expected.machine.devices) == (2, 1)
        assert record.machine.threads == 1
        assert record.best_epoch == expected.best_epoch
        for ours, theirs in zip(record.epochs, expected.epochs, strict=True):
            close(ours, theirs)
        assert record.test is not None
        assert expected.test is not None
        close(record.test, expected.test)
        w = weights(only(alone, expected.seed))
        for key, ours in weights(path).items():
            torch.testing.assert_close(ours, w[key], rtol=1e-4, atol=1e-5)


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    overrides = ["rule=mdfa", "seeds=2", "diagnostics=alignment", "diagnostics.samples=33", "dataset.validation=0.1"]
    records = train(config(tmp_path / "together", *DDP, *overrides))
    assert [record.seed for record in records] == [0, 1]
    assert_trained_as_alone(tmp_path / "together", tmp_path / "alone", overrides)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_does_whatever_the_options(together: Path, tmp_path: Path, name: str) -> None:
    assert_trained_as_alone(together / name, tmp_path, RUNS[name])


@pytest.mark.slow
def test_resumed_processes_end_like_those_left_alone(together: Path) -> None:
    whole, resumed = (Record.read(only(together / name)) for name in ("whole", "resumed"))
    assert resumed.steps == 40
    assert [e["train/accuracy"] for e in resumed.epochs] == [e["train/accuracy"] for e in whole.epochs]
    for ours, theirs in zip(resumed.epochs, whole.epochs, strict=True):
        assert ours == pytest.approx(theirs)
    expected = weights(only(together / "whole"))
    assert all(torch.equal(w, expected[key]) for key, w in weights(only(together / "resumed")).items())


@pytest.mark.parametrize("options", [{}, {"flip": True, "crop": 2}], ids=["plain", "augmented"])
def test_ranks_share_each_mini_batch(toy: Dataset, options: dict[str, Any]) -> None:
    tasks = [task(toy, seed) for seed in (0, 3)]

    def made(rank: int = 0, ranks: int = 1) -> list[Tensor]:
        chunks = zip(*TrainBatches(toy, tasks, 12, lambda: 3, "cpu", rank=rank, ranks=ranks, **options), strict=True)
        return [torch.cat(parts) for parts in chunks]

    parts = [made(rank, 3) for rank in range(3)]
    assert parts[0][0].shape[2] == 4
    for whole, *shared in zip(made(), *parts, strict=True):
        assert torch.equal(torch.cat(shared, 2), whole)


@pytest.mark.parametrize("ranks", [2, 3, 50])
def test_ranks_share_an_evaluation(toy: Dataset, ranks: int) -> None:
    """Every image once, equally many steps on each rank, even where there are fewer images than ranks."""
    tasks = [task(toy, seed, classes=3) for seed in range(2)]
    tables, relabels = [t.test for t in tasks], [t.relabel for t in tasks]
    seen: list[list[int]] = [[], []]
    steps = set()
    for rank in range(ranks):
        found = list(EvalBatches(toy.test, tables, relabels, "cpu", batch_size=5, rank=rank, ranks=ranks))
        steps.add(len(found))
        for pixels, _, mask in found:
            for s in range(2):
                seen[s] += pixels[s, mask[s], 0, 0, 0].tolist()
    assert len(steps) == 1
    assert [sorted(images) for images in seen] == [table.tolist() for table in tables]


class Other:
    """A strategy of another process, which started from other weights."""

    def broadcast(self, _: bytes) -> bytes:
        return b"other"


def test_processes_that_start_from_other_weights_are_stopped() -> None:
    trainer: Any = type("T", (), {"strategy": Other(), "global_rank": 1, "world_size": 2})
    module: Any = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(RuntimeError, match="process 1 has other weights or images than process 0"):
        SameWeights("task").on_train_start(trainer, module)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.devices=2"], "trainer.devices: use 1 (or a list of one device), or trainer=ddp to train on several"),
        (["trainer.devices=[0,1]"], "trainer.devices: use 1 (or a list of one device), or trainer=ddp"),
        (["trainer.num_nodes=2"], "trainer.num_nodes: use 1 (or a list of one device), or trainer=ddp"),
        ([*DDP, "batch_size=25"], "batch_size is 25: write a multiple of 2, the number of devices"),
        ([*DDP, "stack=true"], "stack=true: with trainer=ddp seeds are trained one after another"),
        ([*DDP, "trainer.num_nodes=2"], "trainer.num_nodes is 2, but this is one process: start one a device"),
        (["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=[]"], "trainer.devices"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_divided_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(config(tmp_path, *overrides))


def test_a_clusters_tasks_must_be_the_runs_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"NTASKS": 4, "NTASKS_PER_NODE": 4, "NNODES": 1, "NODEID": 0, "JOB_NAME": "run"}
    for name, value in tasks.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    for rank in (0, 3):
        for name in ("PROCID", "LOCALID"):
            monkeypatch.setenv(f"SLURM_{name}", str(rank))
        for overrides in ([], ["trainer.devices=4", "batch_size=25"], ["trainer.devices=4", "rule.beta=0"]):
            if rank == 0:
                with pytest.raises(Mistake, match=r"--ntasks-per-node=4` does not match|a multiple of 4|beta is 0"):
                    prepare(config(tmp_path, *DDP, *overrides))
            else:  # finds the same, and says nothing
                with pytest.raises(SystemExit, match=r"^1$"):
                    prepare(config(tmp_path, *DDP, *overrides))
        assert prepare(config(tmp_path, *DDP, "trainer.devices=4")).rank == rank


def command(*options: str, launcher: Sequence[str] = (sys.executable, "-m")) -> list[str]:
    return [*launcher, "nobackprop", *SMALL, *OWN, *DDP, "paths.runs=runs", *options]


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_command_trains_in_parallel(tmp_path: Path) -> None:
    sweep = command("rule=bp,fa", "logger=wandb", "--multirun")
    run(sweep, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    for rule in ("bp", "fa"):
        (record,) = (tmp_path / "runs").glob(f"{rule}_*/seed0/record.json")
        assert Record.read(record).machine.devices == 2
        assert len(list(record.parent.glob("wandb/offline-run-*"))) == 1
    assert run(sweep, tmp_path).count("is recorded already") == 2


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


@pytest.mark.slow
def test_torchruns_processes_train_as_one_does_and_tell_a_mistake_once(tmp_path: Path) -> None:
    overrides = ["rule=mdfa", "seeds=2"]
    shown = run(command(*overrides, launcher=TORCHRUN), tmp_path)  # which raises where one of them fails
    assert shown.count("records and weights: runs/mdfa_mlp_digits") == 1
    assert_trained_as_alone(tmp_path / "runs", tmp_path / "alone", overrides)
    wrong = command("batch_size=25", launcher=TORCHRUN)
    ended = subprocess.run(wrong, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.count("nobackprop: ") == 1
    assert "nobackprop: batch_size is 25: write a multiple of 2, the number of devices" in ended.stderr
    assert "preparation.py" not in ended.stderr  # the one traceback there is is torchrun's


@pytest.mark.slow
def test_torchruns_processes_wait_together_and_one_of_them_speaks(tmp_path: Path) -> None:
    folder = prepare(config(tmp_path / "runs")).folder
    (folder / "seed0").mkdir(parents=True)
    log = tmp_path / "log"
    with log.open("w") as file:
        options: dict[str, Any] = {"env": {**os.environ, "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}, "stdout": file}
        with FileLock(folder / "seed0" / ".lock"):
            process = subprocess.Popen(command("seeds=2", launcher=TORCHRUN), cwd=tmp_path, **options)
            until(lambda: "waits" in log.read_text(), unless=lambda: process.poll() is not None and log.read_text())
            assert list(folder.glob("seed1/record.json"))
        assert process.wait(120) == 0
    assert log.read_text().count("waits: another process is training seed 0") == 1
    assert log.read_text().count("records and weights: runs/lra_e_mlp_digits") == 1
    for seed in range(2):
        assert Record.read(only(tmp_path / "runs", seed)).machine.devices == 2


def _second_dies() -> None:
    if os.environ["LOCAL_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_process_that_is_killed_is_told_in_a_sentence() -> None:
    message = r"^process 1 of a run was killed by SIGKILL \(out of memory\?\); the same command goes on from"
    with pytest.raises(ChildProcessError, match=message):
        start(_second_dies, 2)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_leaves_a_checkpoint_that_it_goes_on_from(tmp_path: Path, signum: int) -> None:
    """SIGTERM comes to the command alone, Ctrl-C to all of its processes."""
    options = ["max_epochs=150", "checkpoint_minutes=0"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(*options), cwd=tmp_path, start_new_session=True, **pipes)
    until(lambda: list(tmp_path.glob("runs/*/checkpoints/*/*.ckpt")))
    with pytest.raises(Timeout):
        FileLock(next(tmp_path.glob("runs/*/seed0/.lock")), blocking=False).acquire()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, errors
    assert shown.count("stopped; the same command goes on from step") == 1
    assert "Traceback" not in errors
    assert len(children) >= 2
    until(lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()])  # init takes note of their end
    assert "goes on from step" in run(command(*options), tmp_path)
    record = Record.read(only(tmp_path / "runs"))
    assert len(record.epochs) == 150


def _mistaken(message: str) -> None:
    """In two processes: the first makes a mistake while the second waits for it."""
    process = int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", rank=process, world_size=2)
    if process == 0:
        raise Mistake(message)
    torch.distributed.barrier()


def test_a_mistake_in_one_of_the_processes_is_that_of_the_command() -> None:
    message = "logger: no account" + 100_000 * "."  # more than a pipe holds
    with pytest.raises(Mistake) as caught:
        start(_mistaken, 2, message)
    assert str(caught.value) == message
    assert f"in {_mistaken.__name__}" in caught.value.__notes__[0]


def _connect_and_end(folder: Path) -> None:
    end = folder / f"end{os.environ['LOCAL_RANK']}.txt"
    atexit.register(lambda: end.write_text(f"connected: {torch.distributed.is_initialized()}"))  # called last
    connect(prepare(config(folder, *DDP)).strategy)
    assert torch.distributed.is_initialized()
    torch.distributed.barrier()  # else one may leave before the other has connected
    end.write_text("killed before its end")


def test_a_process_leaves_its_group_before_it_ends(tmp_path: Path) -> None:
    """The threads of a group that is left to the interpreter's end abort a process now and then."""
    start(_connect_and_end, 2, tmp_path)
    assert [path.read_text() for path in sorted(tmp_path.glob("end*.txt"))] == ["connected: False"] * 2
