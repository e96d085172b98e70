"""Keys that came after the first records: these keep their signatures, and mean what the code of then computed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
from conftest import CONF, Config, run_config
from hydra.utils import get_object
from omegaconf import OmegaConf

import nobackprop
from nobackprop.core.losses import SoftmaxCrossEntropy
from nobackprop.core.network import Network, mlp
from nobackprop.data.pixels import Pixels
from nobackprop.records.gathering import collect
from nobackprop.records.identity import RECORDED, before, current_name, recorded_name
from nobackprop.rules.bp import BP
from nobackprop.training.build import prepare
from nobackprop.training.config import Settings
from nobackprop.training.saved import save

FILES = sorted((CONF.parent / "results").glob("*/*.jsonl"))


@dataclass(frozen=True)
class Grown(BP):
    """A rule with keys that it did not have at first."""

    scale: float = 1.0
    mode: str = field(default="new", metadata={"before": "old"})
    count: int | None = field(default=None, metadata={"before": 20})


def _identity(config: Config, *overrides: str) -> dict[str, Any]:
    grown = ["rule=bp", f"rule._target_={__name__}.Grown", "+rule.scale=1.0", *overrides]
    return prepare(config(*grown)).settings.identity()["rule"]


def test_a_later_key_is_in_the_identity_unless_it_has_its_value_of_before(config: Config) -> None:
    at_first = {"_target_": f"{__name__}.Grown", "scale": 1.0}
    assert before(Grown) == {"mode": "old", "count": 20}
    assert _identity(config, "+rule.mode=old", "+rule.count=20") == at_first
    assert _identity(config, "+rule.mode=old", "+rule.count=3") == at_first | {"count": 3}
    new = at_first | {"mode": "new", "count": None}
    assert _identity(config, "+rule.mode=new", "+rule.count=null") == new
    assert _identity(config) == new  # a config that leaves them to their defaults computes by these


def test_weights_of_before_a_key_load_with_the_value_that_they_were_trained_with(tmp_path: Any) -> None:
    path, net = tmp_path / "best.pt", mlp((4,), 2, hidden=[3], activation="tanh")
    save(path, net, Grown(mode="new", count=3), {}, SoftmaxCrossEntropy(2), Pixels(), (0, 1))
    assert nobackprop.load(path).rule == Grown(mode="new", count=3)
    content = torch.load(path, weights_only=True)
    for key in ("mode", "count"):
        del content["rule"]["fields"][key]
    torch.save(content, path)
    assert nobackprop.load(path).rule == Grown(mode="old", count=20)


def _filled(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recorded config with the keys that its components lack."""
    return {
        name: before(get_object(current_name(node["_target_"]))) | node
        if isinstance(node, dict) and "_target_" in node
        else node
        for name, node in config.items()
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recorded_run_has_the_signature_of_its_config(path: Any) -> None:
    today: Any = OmegaConf.to_container(run_config(), resolve=True)
    records = {record.signature: record.config for record in collect([path]).records.values()}
    assert records
    for signature, config in records.items():
        trainer = today["trainer"] | config["trainer"]
        assert Settings.model_validate(today | _filled(config) | {"trainer": trainer}).signature == signature


def test_all_recorded_files_are_there() -> None:
    assert len(FILES) >= 8


@pytest.mark.parametrize(("current", "recorded"), RECORDED.items())
def test_what_moved_keeps_its_recorded_name(current: str, recorded: str) -> None:
    """The table is frozen: modules of today, each with the name that the first records have."""
    assert import_module(current)
    assert recorded_name(f"{current}.Some") == f"{recorded}.Some"
    assert current_name(f"{recorded}.Some") == current_name(f"{current}.Some") == f"{current}.Some"


def test_a_config_with_a_name_of_before_is_the_same_run(config: Config) -> None:
    before, now = (prepare(config(f"arch._target_=nobackprop.{path}.mlp")) for path in ("network", "core.network"))
    assert before.settings == now.settings
    assert now.settings.identity()["arch"]["_target_"] == "nobackprop.network.mlp"
    assert isinstance(before.net, Network)


def test_weights_of_before_a_loss_moved_load(tmp_path: Any) -> None:
    path, net = tmp_path / "best.pt", mlp((4,), 2, hidden=[3], activation="tanh")
    save(path, net, BP(), {}, SoftmaxCrossEntropy(2), Pixels(), (0, 1))
    assert torch.load(path, weights_only=True)["loss"]["class"] == "nobackprop.losses.SoftmaxCrossEntropy"
    assert nobackprop.load(path).loss == SoftmaxCrossEntropy(2)
