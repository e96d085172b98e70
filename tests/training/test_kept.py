"""The config that is kept beside a run makes the same run again."""

from pathlib import Path

import pytest
from conftest import CONF, Config, nobackprop, small, train

from nobackprop.composing import compose
from nobackprop.training import kept
from nobackprop.training.config import Settings


def again(folder: Path, *overrides: str) -> Settings:
    """The settings of `nobackprop --config-dir FOLDER --config-name config`."""
    cfg, _ = compose(overrides, [folder, CONF], "config")
    return Settings.of(cfg)


@pytest.mark.parametrize(
    "overrides",
    [
        ["rule=mdfa", "arch=allconv", "dataset=cifar10", "dataset.classes=2", "schedule=multistep", "seeds=[3,1]"],
        ["rule=dtp", "init=orthogonal", "optimizer=sgd", "optimizer.lr=1e-12", "diagnostics=alignment", "l2=1e-3"],
        ["+experiment=mdfa/mlp_mnist", "rule=dfa", "stack=true", "workers=3", "max_steps=7"],
        ["dataset=imagenet", "arch=allconv_224", "rule=bp", "tuned=compare/conv_bp", "trainer.precision=64-true"],
        ["rule=mdfa", "arch=allconv", "dataset=cifar10_jpeg", "paths.data=/elsewhere"],
    ],
    ids=" ".join,
)
def test_it_has_all_that_identifies_the_run_and_the_commands_other_keys(tmp_path: Path, overrides: list[str]) -> None:
    cfg = small(tmp_path / "runs", *overrides)
    s = Settings.of(cfg)
    kept.write(s)
    text = (s.folder / "config.yaml").read_text()
    assert str(tmp_path) not in text
    assert "elsewhere" not in text
    t = again(s.folder)
    assert t.signature == s.signature
    elsewhere = {"paths", "logger", "launcher", "dataset"}
    assert t.model_dump(exclude=elsewhere) == s.model_dump(exclude=elsewhere)
    own = again(s.folder, f"paths.data={s.paths.data}")
    assert own.dataset == s.dataset  # also where the images are


def test_what_is_of_this_machine_is_asked_for(tmp_path: Path) -> None:
    cfg = small(tmp_path / "runs", "dataset=folder", "dataset.name=birds", f"dataset.source.root={tmp_path}/birds")
    cfg.diagnostics = {"_target_": "mine.Shown", "api_key": "s3cret", "samples": 4}
    s = Settings.of(cfg)
    kept.write(s)
    text = (s.folder / "config.yaml").read_text()
    assert str(tmp_path) not in text
    assert "s3cret" not in text
    with pytest.raises(ValueError, match=r"^dataset\.source\.root must be given: add"):
        again(s.folder, "diagnostics.api_key=other")
    t = again(s.folder, "diagnostics.api_key=other", "dataset.source.root=there", "paths.data=data")
    assert t.signature == s.signature
    assert t.dataset.source["cache"] == "data/birds-224"


@pytest.mark.parametrize(
    "text", ["1e5", "1_0", "12:30:10", "-.5", "0x1f", "2001-01-01", "no", "null", "~", "a: b", "ü", ""]
)
def test_a_text_stays_a_text(tmp_path: Path, text: str) -> None:
    cfg = small(tmp_path / "runs")
    cfg.diagnostics = {"_target_": "mine.Shown", "text": text}
    s = Settings.of(cfg)
    kept.write(s)
    assert again(s.folder, "paths.data=data").diagnostics == s.diagnostics


def test_a_command_makes_the_same_run_again(config: Config, tmp_path: Path) -> None:
    (record,) = train(config("rule=mdfa", "max_epochs=1", "seeds=[4]"))
    (run,) = (tmp_path / "runs").iterdir()
    same = ["--config-dir", str(run), "--config-name", "config", "logger=none"]
    ended = nobackprop(*same, cwd=tmp_path)
    assert f"1 of 1 seeds are recorded already in runs/{record.run}" in ended.stdout, ended.stderr
    ended = nobackprop(*same, "rule.gama=1", cwd=tmp_path)
    assert ended.stderr == "nobackprop: there is no key rule.gama; choose from: _target_, floor\n"


def test_a_disk_that_is_full_does_not_keep_a_run_from_training(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "write_atomically", full)
    assert train(config("rule=bp", "max_epochs=1"))
