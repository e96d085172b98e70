"""A run from its config to its records: what is refused, skipped, resumed, and the same whatever runs beside it."""

import io
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Config, folder, options, run_config, same_results, train
from rich.console import Console

from nobackprop.data.given import held
from nobackprop.data.sources import Digits
from nobackprop.mistakes import Mistake, Notice
from nobackprop.records import provenance
from nobackprop.records.record import Record
from nobackprop.training import checkpoints
from nobackprop.training.build import prepare
from nobackprop.training.checkpoints import ResumePoint
from nobackprop.training.run import summary

GROUPS = (
    "rule",
    "dataset",
    "arch",
    "init",
    "loss",
    "optimizer",
    "schedule",
    "trainer",
    "logger",
    "diagnostics",
    "launcher",
)


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS for o in options(g)])
def test_every_config_composes(config: Config, tmp_path: Path, group: str, option: str) -> None:
    overrides = [f"{group}={option}"]
    if option in ("folder", "imagenet", "imagenet_literal"):
        (tmp_path / "train" / "a").mkdir(parents=True)
        (tmp_path / "train" / "b").mkdir()
        overrides.append(f"dataset.source.root={tmp_path}")
    if option.startswith("allconv"):
        overrides = ["dataset=cifar10", *overrides]
        if option == "allconv_224":
            overrides.append("arch.filters=[[4,9,4],[4,3,2]]")
    if option == "lenet":
        overrides = ["dataset=cifar10", *overrides]
    if option in ("resnet", "vit"):
        overrides.append("rule=bp")
    if option == "module":
        overrides.append("arch._target_=test_module_arch.make_net")
    if option == "sigmoid":
        overrides.append("dataset.classes=2")
    images = torch.zeros(2, 4), torch.arange(2)
    with held(images, images) as fingerprint:
        if option == "given":
            overrides.append(f"dataset.source.fingerprint='{fingerprint}'")
        prepare(config(*overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+foo=1"], "unknown key 'foo'; choose from: rule, dataset,"),
        (["+dataset.foo=1"], "unknown key 'dataset.foo'; choose from: name, source, classes,"),
        (["+init.foo=1"], "unknown key 'init.foo'; choose from: forward, backward"),
        (["+rule.foo=1"], "rule: unknown key foo; choose from: beta, gamma, learn_E, difference"),
        (["+optimizer.foo=1"], "optimizer: unknown key foo; choose from: lr, betas,"),
        (["+trainer.max_epochs=3"], "unknown key 'trainer.max_epochs'; choose from: accelerator, strategy, devices,"),
        (
            ["rule._target_=nobackprop.rules.none.None"],
            "rule: _target_ is nobackprop.rules.none.None, but nobackprop.rules has no none",
        ),
        (
            ["rule._target_=nobackprop.rules.bp"],
            "rule: _target_ is nobackprop.rules.bp, which is neither a class nor a function",
        ),
        (["rule.beta=0"], "rule.beta is 0: it scales the error sent down, so it must be above 0"),
        (["rule=mdfa", "rule.floor=-1"], "rule.floor is -1: mDFA needs non-negative weights, so 0 or more"),
        (["rule=bp", "arch.activation=sign"], "activation 'sign' has no derivative and this rule needs one"),
        (["arch.activation=gelu"], "unknown activation 'gelu': choose one of tanh, relu, leaky_relu,"),
        (["arch=allconv"], "does not fit a feature map of 2x2: use a smaller kernel"),
        (["arch.hidden=[12,0]"], "Dense(units=0): units must be 1 or more"),
        (["rule=mdfa", "init=orthogonal"], "rule MDFA needs non-negative weights (W2)"),
        (["init.forward=Q1"], "init.forward: unknown initializer 'Q1': write one of 0 (zeros), U<v>"),
        (["dataset.classes=11"], "dataset.classes is 11: digits has 10 classes, so 2 to 10"),
        (["dataset=folder"], "dataset.source.root must be given: add dataset.source.root=..."),
        (["seeds=0"], "seeds: write how many, 1 to 100000, or a list such as [0,4,7], got 0"),
        (["seeds=1000000000"], "seeds: write how many, 1 to 100000, or a list"),
        (["seeds=[3,3]"], "seeds: [3, 3] names a seed twice"),
        (["seeds=abc"], "seeds: write how many, 1 to 100000, or a list such as [0,4,7], got 'abc'"),
        (["max_epochs=0"], "max_epochs: Input should be greater than 0, got 0"),
        (["update=median"], "update: Input should be 'mean', 'sum', 'unit_norm' or 'unit_norm_relative', got 'median'"),
        (["optimizer.lr=-1"], "optimizer: lr is -1: it must not be below 0"),
        (["dataset.validation=0"], "dataset.validation: write a fraction between 0 and 1, or how many images, or test"),
        (["trainer.precision=16-true"], "trainer.precision: Input should be '64-true', '32-true' or 'bf16-mixed'"),
        (["rule.learn_E=no"], "rule.learn_E: Input should be a valid boolean, got 'no'"),
        (["rule=usf", "rule.scale=Glorot"], "rule.scale: Input should be a valid number or 'glorot', got 'Glorot'"),
        (["trainer.devices=[]"], "trainer.devices: Input should be a valid integer, got []; trainer.devices: List"),
        (["dataset.classes_seed=3"], "dataset.classes_seed is 3, and dataset.classes is null, all of them"),
        (["threads=2", "workers=4"], "threads is 2 and workers is 4: seeds side by side have one thread each"),
        (["rule.beta=abc"], "rule.beta: Input should be a valid number, got 'abc'"),
        (["arch.hidden=[12.5]"], "arch.hidden: Input should be a valid integer"),
        (["arch.hidden=5"], "arch.hidden: Input should be a valid array, got 5"),
        (["init=normal", "init.forward.std=-1"], "init.forward: std is -1: a standard deviation is 0 or more"),
        (["init=uniform", "init.backward.scale=-1"], "init.backward: scale is -1: it bounds the draw"),
        (["optimizer=tf_rmsprop", "optimizer.lr=-1"], "optimizer: lr is -1: it must not be below 0"),
        (["optimizer.lr=nan"], "optimizer.lr: write a finite number, got nan"),
        (["rule.beta=inf"], "rule.beta: write a finite number, got inf"),
        (["optimizer.betas=[0.9]"], "optimizer: betas is (0.9,): it must be two numbers"),
        (["optimizer.betas=[2,3]"], "optimizer: betas is (2, 3): it is a share of the past, so below 1"),
        (["optimizer=tf_adam", "optimizer.beta1=1"], "optimizer: beta1 is 1: it is a share of the past, so below 1"),
        (["optimizer.eps=-1"], "optimizer: eps is -1: it must not be below 0"),
        (["optimizer=tf_adam", "optimizer.lr=null"], "optimizer.lr: Input should be a valid number, got None"),
        (["optimizer=sgd", "optimizer.momentum=0.9", "optimizer.nesterov=no"], "optimizer.nesterov: Input should be"),
        (["optimizer=sgd", "optimizer.fused=no"], "optimizer.fused: Input should be a valid boolean, got 'no'"),
        (["optimizer=sgd", "optimizer.momentum=high"], "optimizer.momentum: "),
        (["optimizer=tf_rmsprop", "optimizer.decay=0"], "optimizer: decay is 0"),
        (["init=glorot_uniform", "init.forward.gain=-1"], "init.forward: gain is -1"),
        (["init=orthogonal", "init.forward.gain=-1"], "init.forward: gain is -1"),
        (["schedule=multistep", "schedule.milestones=[0.25,0.5]"], "schedule: milestones are numbers of epochs"),
        (["schedule=multistep", "schedule.milestones=[a]"], "schedule: milestones are numbers of epochs"),
        (["schedule=cosine", "schedule.T_max=0"], "CosineAnnealingLR divides by a value of 0: T_max"),
        (["schedule=cosine", "+schedule.interval=batch"], "schedule: write interval: epoch, or interval: step for a"),
        (
            ["schedule=multistep", "+schedule.interval=step", "schedule.milestones=[1]", "schedule.gamma=-1"],
            "schedule: the rate becomes -0.0",
        ),
        (["schedule=cosine", "schedule.T_max=abc"], "schedule.T_max: Input should be a valid number, got 'abc'"),
        (["schedule=multistep", "schedule.milestones=5"], "schedule.milestones: Input should be a valid array, got 5"),
        (["schedule=multistep", "schedule.milestones=[1,2]", "schedule.gamma=-1"], "schedule: the rate becomes -0.0"),
        (["schedule=multistep", "schedule.milestones=[1]", "schedule.gamma=abc"], "schedule.gamma: "),
        (["optimizer=sgd", "optimizer.lr=abc"], "optimizer.lr: Input should be a valid number, got 'abc'"),
        (
            ["dataset.crop=8"],
            "dataset.crop is 8: images are shifted by up to as many pixels, so write fewer than the 8",
        ),
        (["arch.hidden=[3000000000000]"], "arch: this net takes more memory than there is: "),
        (["arch.hidden=[9000000000000000000000]"], "arch: W1 would have the shape (9000000000000000000000, 64), more"),
        (["init=uniform", "init.forward.power=1e300"], "init: Uniform(scale=1.0, power=1e+300) draws from +-inf at a"),
        (["init=normal", "init.forward.std=1e39"], "init.forward: std is 1e+39: a standard deviation is 0 or more"),
        (["init=glorot_normal", "init.forward.gain=1e39"], "init.forward: gain is 1e+39: it multiplies weights"),
        (["init.forward=U1e39"], "init.forward: initializer 'U1e39': a float32 has no such weights"),
        (["dataset.name=a/b"], "dataset.name: String should match pattern"),
        (["logger=wandb", "logger.mode=foo"], "logger.mode: Input should be 'online', 'offline' or 'disabled'"),
        (["diagnostics=alignment", "diagnostics.samples=0"], "diagnostics.samples is 0: it must be 1 or more"),
        (["trainer.accelerator=abacus"], "trainer.accelerator: Input should be 'auto', 'cpu', 'gpu' or 'cuda'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_refused_before_data_is_loaded(
    config: Config, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setattr(Digits, "load", lambda _: pytest.fail("data was loaded"))
    with pytest.raises(ValueError, match=re.escape(message)):
        train(config(*overrides))


def one_cycle(steps: int, *overrides: str) -> list[str]:
    cycle = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "_partial_": "true", "max_lr": 0.01, "interval": "step"}
    return [f"+schedule.{key}={value}" for key, value in (cycle | {"total_steps": steps}).items()] + [*overrides]


def test_a_schedule_as_long_as_the_run_is_taken_and_a_shorter_one_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = train(config(*one_cycle(322)))
    assert record.steps == 322
    (record,) = train(config(*one_cycle(100, "max_steps=100")))
    assert record.steps == 100
    monkeypatch.setattr("nobackprop.training.run._fit", lambda *_: pytest.fail("training began"))
    with pytest.raises(Mistake, match=r"schedule: Tried to step 322 times\. .* total steps is 321"):
        train(config(*one_cycle(321)))


def test_a_schedule_that_leaves_the_rate_alone_is_told(config: Config) -> None:
    with pytest.warns(Notice, match=r"the schedule leaves the rate at 0\.\d+ for all of these 2 epochs"):
        train(config("schedule=multistep", "max_epochs=2"))


def test_an_optimizer_that_mixes_seeds_is_refused_for_a_stack(config: Config) -> None:
    mixing = ["optimizer._target_=torch.optim.Adafactor", "~optimizer.betas", "~optimizer.eps", "seeds=2"]
    with pytest.raises(ValueError, match=r"Adafactor mixes the seeds of a stack.*stack=false"):
        train(config(*mixing, "stack=true"))
    assert len(train(config(*mixing, "stack=false", "max_epochs=1"))) == 2


def test_a_record_says_what_was_run(config: Config) -> None:
    cfg = config("rule=dfa", "dataset.classes=3", "seeds=[4]", "dataset.validation=100")
    (record,) = train(cfg)
    assert record == Record.read(folder(cfg) / "seed4" / "record.json")
    assert (record.seed, record.name, record.steps) == (4, "dfa_mlp_digits", 2 * (record.data.train // 8))
    assert record.config["rule"] == {"_target_": "nobackprop.rules.dfa.DFA"}
    assert record.data.validation == 100
    assert len(record.data.classes) == 3
    assert [e["epoch"] for e in record.epochs] == [1, 2]
    assert record.test is not None
    assert set(record.test) == {"loss", "accuracy"}
    assert record.machine.threads == 1
    assert torch.__version__.startswith(record.versions["torch"])
    assert str(Path.cwd()) not in record.model_dump_json()  # a record may be published


def test_the_test_images_may_choose_the_epoch_where_that_is_asked_for(config: Config) -> None:
    (record,) = train(config("dataset.validation=test", "max_epochs=2"))
    assert record.data.validation == record.data.test == 1797 - record.data.train
    assert record.test is not None
    assert record.test["accuracy"] == record.validation == max(e["val/accuracy"] or 0 for e in record.epochs)


def test_the_commit_is_looked_up_before_training(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes meanwhile holds other code than was imported."""
    commits = iter(["imported"])
    monkeypatch.setattr(provenance, "source_state", cache(lambda: (next(commits), False)))

    def fit(*_: Any) -> list[Record]:
        assert provenance.source_state.cache_info().currsize == 1  # pyright: ignore
        raise InterruptedError

    monkeypatch.setattr("nobackprop.training.run._fit", fit)
    with pytest.raises(InterruptedError):
        train(config())


def test_a_stack_may_have_many_seeds(config: Config) -> None:
    assert len(train(config("stack=true", "seeds=100", "max_steps=1", "arch.hidden=[2]"))) == 100


def test_top5_is_recorded_above_five_classes(config: Config) -> None:
    (record,) = train(config("max_epochs=1"))
    assert record.test is not None
    assert record.test["accuracy"] <= record.test["top5"] <= 1


def test_recorded_seeds_are_not_trained_again(config: Config) -> None:
    first = train(config("seeds=2"))
    more = train(config("seeds=3", "threads=1", "checkpoint_minutes=1"))  # neither can change a result
    assert more[:2] == first
    assert more[2].seed == 2


@pytest.mark.parametrize("change", ["rule.beta=0.2", "optimizer.lr=0.01", "max_epochs=1", "dataset.validation=0.2"])
def test_whatever_changes_the_result_changes_the_signature(config: Config, change: str) -> None:
    assert prepare(config(change)).settings.signature != prepare(config()).settings.signature


def test_what_cannot_change_the_result_keeps_the_signature(config: Config) -> None:
    other = config(
        "seeds=5",
        "logger=wandb",
        "diagnostics=alignment",
        "paths.data=elsewhere",
        "trainer.accelerator=cpu",
        "threads=2",
    )
    assert prepare(other).settings.signature == prepare(config()).settings.signature


@pytest.mark.parametrize("rule", options("rule"))
def test_a_seeds_record_does_not_depend_on_what_runs_beside_it(config: Config, tmp_path: Path, rule: str) -> None:
    overrides = [f"rule={rule}", "dataset.classes=3", "max_epochs=1"]
    train(config(*overrides, "seeds=[1]", f"paths.runs={tmp_path}/alone"))
    train(config(*overrides, "seeds=[0,1,2]"))
    assert same_results(tmp_path / "alone", tmp_path / "runs", "*/seed1") == 1


@pytest.mark.parametrize("further", [["schedule=cosine"], ["schedule=cosine_steps"], ["trainer.precision=64-true"]])
def test_a_resumed_run_ends_like_one_left_alone(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, further: list[str]
) -> None:
    """From every checkpoint: in mid-epoch, between epochs, after the last; momentum, schedule, best weights too."""
    overrides = ["optimizer=sgd", "optimizer.momentum=0.9", *further, "rule=mdfa", "checkpoint_minutes=0"]
    cfg = config(*overrides)
    copies: dict[int, Path] = {}
    contents: dict[Path, bytes] = {}
    save = ResumePoint.save

    def save_and_copy(self: ResumePoint, trainer: Any) -> None:
        save(self, trainer)
        last = checkpoints.files(self.folder)[-1]
        assert checkpoints.step(last) == trainer.lightning_module.steps
        copies[checkpoints.step(last)] = last
        contents[last] = last.read_bytes()

    monkeypatch.setattr(ResumePoint, "save", save_and_copy)
    train(cfg)
    monkeypatch.undo()
    assert list(copies) == [100, 161, 261, 322]
    for steps, checkpoint in copies.items():
        again = config(*overrides, f"paths.runs={tmp_path}/{steps}")
        path = folder(again) / checkpoint.relative_to(folder(cfg))
        path.parent.mkdir(parents=True)
        path.write_bytes(contents[checkpoint])
        (resumed,) = train(again)
        assert same_results(tmp_path / "runs", tmp_path / str(steps)) == 1
        assert resumed.wall_s > torch.load(io.BytesIO(contents[checkpoint]), weights_only=True)["wall_s"]
        assert not path.parent.exists()


@pytest.mark.parametrize("length", [["max_epochs=2"], ["max_epochs=5", "max_steps=322"]])
def test_a_cosine_of_mini_batches_is_as_long_as_the_run(config: Config, tmp_path: Path, length: list[str]) -> None:
    given = ["+schedule.T_max=322", f"paths.runs={tmp_path}/given"]
    (record,) = train(config("schedule=cosine_steps", *length))
    (same,) = train(config("schedule=cosine_steps", *length, *given))
    assert record.steps == 322
    assert record.epochs == same.epochs
    assert "T_max" not in record.config["schedule"]


def test_max_steps_ends_a_run_in_mid_epoch(config: Config) -> None:
    (record,) = train(config("max_steps=200", "max_epochs=5"))
    assert (record.steps, len(record.epochs)) == (200, 2)


def test_debug_is_quick_and_keeps_to_itself() -> None:
    settings = prepare(run_config("+experiment=debug")).settings
    assert (settings.max_steps, settings.paths.runs, settings.logger) == (50, "runs/debug", {})


def test_the_summary_shows_each_seed_and_the_mean(config: Config) -> None:
    records = train(config("seeds=2", "max_epochs=1"))
    lost = records[1].model_copy(update={"test": None, "best_epoch": None, "diverged_epoch": 1})
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(summary(records))
    console.print(summary([records[0], lost]))
    shown = console.export_text()
    assert records[0].test is not None
    assert f"{records[0].test['accuracy']:.2%}" in shown
    assert "mean" in shown
    assert "- (diverged in 1)" in shown


def test_a_misplaced_record_is_named(config: Config) -> None:
    cfg = config("max_epochs=1", "seeds=2")
    train(cfg)
    (folder(cfg) / "seed0" / "record.json").replace(folder(cfg) / "seed1" / "record.json")
    with pytest.raises(ValueError, match=r"seed1/record\.json is the record of seed 0 .* put in the wrong"):
        train(cfg)


def test_other_images_under_the_same_name_are_not_mixed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config("max_epochs=1"))
    digits = Digits().load()
    other = replace(digits, test=replace(digits.test, labels=digits.test.labels.flip(0)))
    monkeypatch.setattr(Digits, "load", lambda _: other)
    with pytest.raises(ValueError, match=r"seed 0 is recorded in .* with other images of digits .*: use another paths"):
        train(config("max_epochs=1", "seeds=2"))


def test_a_full_disk_at_the_end_loses_nothing_and_other_images_do_not_resume_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    cfg = config("checkpoint_minutes=0")
    monkeypatch.setattr("nobackprop.training.run.save", full)
    with pytest.raises(OSError, match="No space left"):
        train(cfg)
    monkeypatch.undo()
    (left,) = (folder(cfg) / "checkpoints").iterdir()
    assert Digits().load().fingerprint in left.name  # so that a run on other images looks for another one
    assert train(cfg)[0].steps == 322
    assert not left.exists()


def test_one_diagnostic_setting_more_leaves_the_record_as_it_is(config: Config, tmp_path: Path) -> None:
    (plain,) = train(config())
    (more,) = train(config("diagnostics=alignment", f"paths.runs={tmp_path}/more"))
    assert more.test == plain.test
    assert "angle/update_W1" in more.epochs[0]
    assert plain.epochs[0].items() <= more.epochs[0].items()


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_other_precisions_train(config: Config, precision: str) -> None:
    (record,) = train(config(f"trainer.precision={precision}", "optimizer.lr=0.01", "max_epochs=5"))
    assert record.precision == precision
    assert record.test is not None
    assert record.test["accuracy"] > 0.8


def test_steps_are_those_of_each_seed(config: Config) -> None:
    records = train(config("stack=true", "seeds=4", "patience=1", "max_epochs=12", "optimizer.lr=0.05"))
    assert [r.steps for r in records] == [161 * len(r.epochs) for r in records]
    assert len({r.steps for r in records}) > 1


def test_numbers_that_are_equal_are_one_config(config: Config) -> None:
    signature = prepare(config("rule.beta=1")).settings.signature
    assert prepare(config("rule.beta=1.0")).settings.signature == signature


def test_a_damaged_record_is_named(config: Config) -> None:
    cfg = config("max_epochs=1")
    train(cfg)
    path = folder(cfg) / "seed0" / "record.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"record.json is damaged .* delete it to run this seed again"):
        train(cfg)


def test_a_record_does_not_say_where_things_are(monkeypatch: pytest.MonkeyPatch) -> None:
    places = ["paths.runs=/a", "dataset.source.root=/b", "--runs", "/c", "--runs=/d"]
    monkeypatch.setattr("sys.argv", ["/e/tune.py", "compare", *places, "--only", "rule=bp"])
    assert provenance.command() == "tune.py compare --only rule=bp"
    for arguments, kept in {
        "nobackprop": "nobackprop",
        "/e/nobackprop paths.runs=/a": "nobackprop",
        "reproduce.py mdfa --set paths.runs=/a --epochs 3": "reproduce.py mdfa --epochs 3",
        "reproduce.py mdfa --set paths.runs=/a": "reproduce.py mdfa",
        "reproduce.py mdfa --set paths.runs=/a workers=1 --epochs 3": "reproduce.py mdfa --set workers=1 --epochs 3",
        "/e/nobackprop/__main__.py rule=bp paths.data=/a": "nobackprop rule=bp",
    }.items():
        monkeypatch.setattr("sys.argv", arguments.split())
        assert provenance.command() == kept
