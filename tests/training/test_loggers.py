"""What the logs get: one a seed, whole after an interruption, with the same numbers. W&B as far as it shows offline."""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
from conftest import CONF, Config, small, train
from omegaconf import OmegaConf
from rich.console import Console

from nobackprop.cli import announce_mode
from nobackprop.mistakes import Mistake
from nobackprop.training import loggers
from nobackprop.training.build import prepare
from nobackprop.training.checkpoints import ResumePoint
from nobackprop.training.config import Settings
from nobackprop.training.weights_and_biases import WeightsAndBiases


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A small run on digits, of 20 mini-batches an epoch, that keeps W&B runs offline."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return partial(small, tmp_path / "runs", "logger=wandb", "batch_size=64")


def offline_run(seed_folder: Path) -> dict[str, list[Any]]:
    """The one W&B run of a seed: its entries by type, each type's in order."""
    (run,) = seed_folder.glob("wandb/offline-run-*")
    inspect = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", run]
    shown = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    entries: dict[str, list[Any]] = {}
    for line in map(json.loads, shown.splitlines()):
        entries.setdefault(line["type"], []).append(line.get(line["type"]))
    return entries


def save_and_fail_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a run fail just after it has written the checkpoint of that step."""
    save = ResumePoint.save

    def save_and_fail(self: ResumePoint, trainer: Any) -> None:
        save(self, trainer)
        if trainer.lightning_module.steps == step:
            raise OSError("No space left on device")

    monkeypatch.setattr(ResumePoint, "save", save_and_fail)


@pytest.mark.parametrize("interrupted", [20, 40])
def test_an_interrupted_run_is_one_run(config: Config, monkeypatch: pytest.MonkeyPatch, interrupted: int) -> None:
    """After the first epoch, and when all is trained but nothing recorded."""
    save_and_fail_at(interrupted, monkeypatch)
    cfg = config("checkpoint_minutes=0")
    run = prepare(cfg)
    with pytest.raises(OSError, match="No space"):
        train(cfg)
    monkeypatch.undo()
    before = offline_run(run.seed_folder(0))
    (record,) = train(cfg)
    after = offline_run(run.seed_folder(0))
    assert before["run"][0]["run_id"] == after["run"][0]["run_id"] == f"{run.settings.signature}-0"
    assert len(before["history"]) == interrupted // 20
    assert after["metric"][-1] == {
        "glob_name": "*",
        "options": {"defined": True, "step_sync": True},
        "step_metric": "trainer/global_step",
    }
    for entry, epoch in zip(after["history"], record.epochs, strict=True):
        assert entry["step"] == {"num": epoch["step"]}  # by which an online run knows what it has
        own = {key: value for key, value in entry["item"].items() if not key.startswith("_")}
        assert own == {**epoch, "trainer/global_step": epoch["step"]}


def test_each_seed_is_a_run_with_its_config_and_scores_that_is_finished(config: Config) -> None:
    cfg = config("seeds=2", "max_epochs=4", "optimizer.lr=0.1")  # the last epoch is not the best
    for record in train(cfg):
        content = offline_run(prepare(cfg).seed_folder(record.seed))
        assert [end["exit_code"] for end in content["exit"]] == [0]
        given = content["run"][0]["config"]["update"]
        assert (given["seed"], given["arch"]["hidden"]) == (record.seed, [12])
        summary = {name: value for entry in content["summary"] for name, value in entry["update"].items()}
        assert record.test is not None
        assert summary["test/accuracy"] == pytest.approx(record.test["accuracy"])
        assert summary["val/best_accuracy"] == record.validation
        assert record.best_epoch != len(record.epochs)
        assert summary["trainer/global_step"] == record.steps


Entries = list[tuple[int, dict[str, float]]]  # of a log: the mini-batch and the numbers of each


def in_csv(seed_folder: Path) -> Entries:
    with (seed_folder / "csv" / "metrics.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [(int(row["step"]), row) for row in rows]


def in_tensorboard(seed_folder: Path) -> Entries:
    """Its scalars, kept as float32; those of one step are one entry, as the last epoch and the final figures are."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (_,) = (seed_folder / "tensorboard").glob("events.out.tfevents.*")
    events = EventAccumulator(str(seed_folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    entries: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in entries.setdefault(event.step, {})  # else twice in the log
            entries[event.step][name] = event.value
    return sorted(entries.items())


@pytest.mark.parametrize(("logger", "entries"), [("csv", in_csv), ("tensorboard", in_tensorboard)])
def test_a_seed_that_diverged_is_logged_and_recorded(
    config: Config, logger: str, entries: Callable[[Path], Entries]
) -> None:
    cfg = config(f"logger={logger}", "optimizer=sgd", "optimizer.lr=1e30", "arch.activation=relu", "max_epochs=1")
    (record,) = train(cfg)
    assert record.diverged_epoch == 1
    ((step, given), *_) = entries(prepare(cfg).seed_folder(0))
    assert (step, "val/accuracy" in given, "val/loss" in given) == (record.steps, True, False)


@pytest.mark.parametrize("interrupted", [None, 20, 40])
@pytest.mark.parametrize(("logger", "entries"), [("csv", in_csv), ("tensorboard", in_tensorboard)])
def test_logs_in_files_have_each_epoch_once_and_the_final_figures(
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    logger: str,
    entries: Callable[[Path], Entries],
    interrupted: int | None,
) -> None:
    cfg = config(f"logger={logger}", "checkpoint_minutes=0", "seeds=2", "workers=1", "max_epochs=3", "optimizer.lr=0.1")
    if interrupted:
        save_and_fail_at(interrupted, monkeypatch)
        with pytest.raises(OSError, match="No space"):
            train(cfg)
        monkeypatch.undo()
        assert [step for step, _ in entries(prepare(cfg).seed_folder(0))] == [20, 40][: interrupted // 20]
    records = train(cfg)
    assert records[0].epochs != records[1].epochs
    for record in records:
        assert record.test is not None
        final = {f"test/{key}": value for key, value in record.test.items()} | {"val/best_accuracy": record.validation}
        expected: Any = [(e["step"], {**e, "trainer/global_step": e["step"]}) for e in record.epochs]
        if logger == "tensorboard":
            expected[-1][1].update(final)
        else:
            expected.append((record.steps, {**final, "step": record.steps}))
        found = entries(prepare(cfg).seed_folder(record.seed))
        assert [step for step, _ in found] == [step for step, _ in expected]
        for (_, given), (_, right) in zip(found, expected, strict=True):
            assert given == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_logs_in_files_have_the_config_as_hyper_parameters_without_the_machines_paths(
    config: Config, tmp_path: Path, logger: str
) -> None:
    cfg = config(f"logger={logger}", f"paths.data={tmp_path}/data", "max_epochs=1", "seeds=[3]")
    train(cfg)
    log = prepare(cfg).seed_folder(3) / logger
    kept: Any = OmegaConf.to_container(OmegaConf.load(log / "hparams.yaml"))
    assert (kept["seed"], kept["arch"]["hidden"]) == (3, [12])
    everything = b"".join(path.read_bytes() for path in log.rglob("*") if path.is_file())
    assert str(tmp_path).encode() not in everything
    if logger == "tensorboard":  # its table of hyper-parameters
        assert b"_hparams_/session_start_info" in everything
        assert b"rule/beta" in everything


def test_without_tensorboard_a_sentence_says_what_to_install(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    cfg = config("logger=tensorboard")
    with pytest.raises(Mistake, match=r"logger=tensorboard needs a package .*: pip install tensorboard"):
        train(cfg)
    assert not Settings.of(cfg).folder.exists()


@pytest.mark.parametrize("machine", [False, True])
def test_wandb_learns_where_it_was_trained_only_when_asked(config: Config, tmp_path: Path, machine: bool) -> None:
    s = Settings.of(config("launcher=slurm", "launcher.account=mine", f"paths.data={tmp_path}/data"))
    content = s.model_dump()
    content["dataset"]["source"] |= {"root": f"{tmp_path}/images", "split": "a"}
    given: Any = {key: value for key, value in s.logger.items() if not key.startswith("_")} | {"machine": machine}
    log = WeightsAndBiases(**given).open(s.folder, 0, content)
    log.log_metrics({"val/accuracy": 0.5}, 1)
    log.close(failed=False)
    kept = offline_run(s.folder / "seed0")
    here = (gethostname(), str(tmp_path), str(Path.cwd()), sys.executable, sys.argv[0])
    found = {text for text in here if f'"{text}' in json.dumps(kept)}
    everything = b"".join(path.read_bytes() for path in (s.folder / "seed0").rglob("*") if path.is_file())
    assert (gethostname() in found) == machine
    assert (str(tmp_path).encode() in everything) == machine
    assert machine or not found
    update = kept["run"][0]["config"]["update"]
    assert ("paths" in update, "launcher" in update) == (machine, machine)
    assert update["dataset"]["source"]["split"] == "a"
    assert content["paths"]["data"] == f"{tmp_path}/data"  # for the others who use it


def test_wandb_is_online_only_when_the_user_says_so(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def mode(*overrides: str) -> tuple[str, str]:
        console = Console(file=io.StringIO(), width=200)
        cfg = config(*overrides)
        announce_mode(cfg, console)
        assert isinstance(console.file, io.StringIO)
        return Settings.of(cfg).logger["mode"], console.file.getvalue()

    assert mode() == ("offline", "")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert mode() == ("online", "W&B is online by WANDB_MODE; logger.mode=... overrides it\n")
    assert mode("logger.mode=disabled") == ("disabled", "")


def test_seeds_of_a_config_are_a_group_and_a_sweep_may_be_one(config: Config) -> None:
    cfg = config("seeds=2", "max_epochs=1")
    train(cfg)
    runs = [offline_run(prepare(cfg).seed_folder(seed))["run"][0] for seed in range(2)]
    assert [run["run_group"] for run in runs] == [prepare(cfg).folder.name] * 2
    assert len({run["run_id"] for run in runs}) == 2
    other = config("rule=fa", "max_epochs=1", "logger.group=rules")
    train(other)
    assert offline_run(prepare(other).folder / "seed0")["run"][0]["run_group"] == "rules"


def test_every_command_of_the_sweep_is_a_config(config: Config) -> None:
    sweep: Any = OmegaConf.to_container(OmegaConf.load(CONF.parent / "scripts" / "wandb_sweep.yaml"))
    names = list(sweep["parameters"])
    choices = [p.get("values") or [p["value"]] for p in sweep["parameters"].values()]
    (at,) = (i for i, word in enumerate(sweep["command"]) if word == "${args_no_hyphens}")
    signatures = set()
    for values in product(*choices):
        arguments = [f"{name}={value}" for name, value in zip(names, values, strict=True)] + sweep["command"][at + 1 :]
        s = Settings.of(config(*arguments))
        signatures.add((s.signature, *s.seeds))
        assert len(s.seeds) == 1
    assert len(signatures) == 4 * 2 * 3


def test_several_seeds_are_refused_in_a_wandb_sweep(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    with pytest.raises(ValueError, match=r"a run of a W&B sweep is one seed, such as seeds=\[0\]; got \[0, 1\]"):
        train(config("seeds=2"))
