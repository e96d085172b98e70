"""A run of a torch module of a user's own: `arch=module arch._target_=my.module.make_net`."""

from dataclasses import dataclass

import pytest
import torch
from conftest import Config, folder, train
from torch import Tensor, nn

import nobackprop
from nobackprop.core.maps import Flatten, Shape
from nobackprop.mistakes import Mistake, Unknown
from nobackprop.training.build import prepare


def make_net(in_shape: Shape, outputs: int, *, width: int = 8, norm: bool = True) -> nn.Module:
    """A convolutional net, or one that can't be taken."""
    return nn.Sequential(
        nn.Conv2d(in_shape[0], width, 3, padding=1),
        nn.GroupNorm(2, width, affine=False) if norm else nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(width * in_shape[1] * in_shape[2] // 4, outputs)),
    )


def make_mlp(in_shape: Shape, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, outputs))


def five_outputs(in_shape: Shape, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


@dataclass(frozen=True)
class Times(nobackprop.Map):
    """A map of a user's own."""

    by: float = 1.0

    def __call__(self, h: Tensor) -> Tensor:
        return self.by * h


def with_own_map(in_shape: Shape, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nobackprop.MapModule(Times(3.0)), nn.Linear(64, outputs))


def slip(in_shape: Shape, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, {}["outputs"]))


def of(name: str, *overrides: str) -> list[str]:
    return ["arch=module", f"arch._target_={__name__}.{name}", *overrides]


def test_a_module_is_trained_and_comes_back_as_one(config: Config) -> None:
    cfg = config(*of("make_net", "+arch.width=6"), "rule=dfa", "max_epochs=2", "optimizer.lr=0.01")
    records = train(cfg)
    assert records[0].config["arch"] == {"_target_": f"{__name__}.make_net", "width": 6}
    assert folder(cfg).name.startswith("dfa_make_net_digits-")
    for record in records:
        assert record.test is not None
        assert record.test["accuracy"] > 0.8
    trained = nobackprop.load(folder(cfg) / "seed0")
    module = nobackprop.to_torch(trained.net, trained.weights).eval()
    images = nobackprop.Digits().load().test.pixels
    torch.testing.assert_close(module(images / 255), trained.logits(images))


def test_its_weights_start_as_those_of_every_net(config: Config) -> None:
    (one,), (other,) = (train(config(*net, "rule=lra_e")) for net in (of("make_mlp"), ["arch.hidden=[12]"]))
    assert one.test == other.test
    assert one.signature != other.signature


def test_a_net_with_a_map_of_ones_own_is_loaded_where_that_is_imported(config: Config) -> None:
    cfg = config(*of("with_own_map"), "rule=bp", "max_epochs=1")
    record, *_ = train(cfg)
    path = folder(cfg) / "seed0" / "best.pt"
    trained = nobackprop.load(path)
    assert trained.net.layers[0].read == (Flatten(), Times(3.0))
    assert trained.evaluate(nobackprop.Digits().load().test) == pytest.approx(record.test)
    content = torch.load(path, weights_only=True)
    content["net"]["layers"][0]["read"][1]["type"] = "my.Elsewhere"
    torch.save(content, path)
    with pytest.raises(Unknown, match=r"best\.pt was trained with a net with my\.Elsewhere, which is not .*: import"):
        nobackprop.load(path)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (of("make_net", "+arch.norm=false"), r"^arch: module\.1, BatchNorm2d\(.* use nn\.GroupNorm"),
        (of("five_outputs"), r"^arch: .*five_outputs makes a net of 5 outputs, and 10 are needed"),
        (of("make_net", "+arch.widht=3"), r"^arch: unknown key widht; choose from: .*Did you mean width\?"),
        (of("make_net", "rule=dtp"), "DTP does not train nets with normalization"),
        (["arch=module"], r"^arch\._target_ must be given: add arch\._target_=\.\.\."),
    ],
)
def test_a_mistake_in_it_is_told_with_its_place(config: Config, overrides: list[str], told: str) -> None:
    with pytest.raises(Mistake, match=told):
        prepare(config(*overrides))


def test_a_slip_in_its_code_keeps_its_traceback(config: Config) -> None:
    with pytest.raises(Exception, match="KeyError") as caught:
        prepare(config(*of("slip")))
    assert not isinstance(caught.value, Mistake)
