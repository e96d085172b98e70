"""Nets of any parts: how a list becomes a net, what it is in torch, what can't be one; the nets of the configs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import CONF, MAPPED, Problem
from hydra.utils import get_method
from omegaconf import OmegaConf
from torch import Tensor, nn

from nobackprop.core.activations import ACTIVATIONS
from nobackprop.core.architectures import Part, Residual, assemble, row, vgg
from nobackprop.core.initializers import Normal, initial_weights
from nobackprop.core.layers import Conv, Dense, Shortcut, Tokens
from nobackprop.core.maps import AvgPool, Elementwise, GroupNorm, LayerNorm, MaxPool, Mean, Patches, Shrink
from nobackprop.core.network import Network, _bottoms
from nobackprop.rules.bp import BP

RELU, TANH = ACTIVATIONS["relu"], ACTIVATIONS["tanh"]


def _weights(net: Network) -> dict[str, Tensor]:
    w = initial_weights(net, BP(), Normal(0.4), Normal(0.4), seed=0)
    generator = torch.Generator().manual_seed(1)
    return {name: (t + 0.1 * torch.randn(t.shape, generator=generator)).double() for name, t in w.items()}


def _filled(module: nn.Sequential, w: dict[str, Tensor]) -> nn.Sequential:
    """The module with W1 b1, W2 b2, ... in its layers, in order."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    for l, part in enumerate(layers, 1):
        part.load_state_dict({"weight": w[f"W{l}"]} | ({} if part.bias is None else {"bias": w[f"b{l}"]}))
    return module.double()


def test_a_net_with_pooling_is_torchs() -> None:
    net = row(
        (2, 12, 11),
        3,
        layers=[
            {"conv": {"channels": 4, "kernel": 3, "groups": 2, "dilation": 2}},
            "tanh",
            {"max_pool": 2},
            {"conv": [6, 2]},
            {"group_norm": 3},
            "relu",
            {"avg_pool": [2, 1]},
            "flatten",
            {"dense": 5},
            "relu",
        ],
    )
    w = _weights(net)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, dilation=2),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 2),
        nn.GroupNorm(3, 6, affine=False),
        nn.ReLU(),
        nn.AvgPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    x = torch.randn(6, 2, 12, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(net.logits(w, x), _filled(module, w)(x))


def test_a_residual_net_is_torchs() -> None:
    block = Residual((GroupNorm(2), RELU, Conv(6, 3, 2, 1), TANH, Conv(6, 3, 1, 1)))
    net = assemble((2, 7, 6), [Conv(4, 3, 1, 1), AvgPool(2, 1), block, RELU, Mean(), Dense(3)])
    assert net.layers[2].shortcut == Shortcut(2, (AvgPool(2, 1), Shrink(2, 6)))
    w = _weights(net)
    shrink = Shrink(2, 6)
    below = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.AvgPool2d(2, 1)).double()
    branch = nn.Sequential(
        nn.GroupNorm(2, 4, affine=False), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1)
    )
    module = nn.Sequential(below, branch, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    _filled(module, w)
    x = torch.randn(6, 2, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = module[2:](branch(below(x)) + shrink(below(x)))
    torch.testing.assert_close(net.logits(w, x), expected)


def test_what_is_behind_a_layer_is_its_activation_and_all_else_is_read_by_the_next() -> None:
    parts: list[Part] = [MaxPool(2), Dense(5), TANH, RELU, Dense(4), LayerNorm(), TANH, Dense(3)]
    net = assemble((1, 6, 6), parts)
    assert [layer.read for layer in net.layers] == [
        (MaxPool(2),),
        (Elementwise(RELU),),
        (LayerNorm(), Elementwise(TANH)),
    ]
    assert [layer.activation for layer in net.layers] == [TANH, ACTIVATIONS["identity"], None]
    assert net.read_shapes == ((1, 6, 6), (1, 3, 3), (5,), (4,))


def test_a_description_gives_every_net_back(mapped: Problem) -> None:
    description = mapped.net.describe()
    assert Network.from_description(description) == mapped.net
    assert description["layers"][0]["type"] in ("Conv", "Tokens")

    def plain(value: Any) -> bool:
        if isinstance(value, list | dict):
            return all(plain(each) for each in (value.values() if isinstance(value, dict) else value))
        return type(value) in (str, int, float, bool)

    assert plain(description)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "a net ends with a layer without an activation"),
        ([Dense(3), RELU], "a net ends with a layer without an activation"),
        ([Dense(3), LayerNorm()], "a net ends with a layer without an activation"),
        ([Dense(4), Conv(3, 3), Dense(3)], r"part 2 of the net, Conv\(.*\): .* needs images"),
        ([Dense(4), Tokens(3), Dense(3)], r"part 2 of the net, Tokens\(.*\): .* needs tokens"),
        ([Conv(3, 3, groups=2), Dense(3)], "2 groups must divide its channels and the 1 that come in"),
        ([Residual((Conv(3, 3, 1, 1), MaxPool(2))), Dense(3)], "Residual: a residual block ends with a layer"),
        ([Residual((Conv(3, 3, 1, 1), Residual((Conv(3, 3, 1, 1),)))), Dense(3)], "would have two shortcuts"),
        ([Residual((Dense(7),)), Dense(3)], r"makes \(7,\) of \(1, 9, 9\)"),
        ([Conv(4, 3), Residual((Conv(2, 3, 1, 1),)), Dense(3)], r"makes \(2, 7, 7\) of \(4, 7, 7\)"),
    ],
)
def test_parts_that_are_no_net_are_refused_by_name(parts: list[Part], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assemble((1, 9, 9), parts)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("dense", "arch.layers is 'dense': write a list of parts"),
        ([{"dens": 4}], r"arch.layers\[0\] is 'dens': choose one of dense, conv, tokens, .* Did you mean dense\?"),
        ([{"dense": 4, "conv": 3}], r"arch.layers\[0\] is .*: write a name, or one name with what it takes"),
        (
            [{"dense": {"width": 4}}],
            r"arch.layers\[0\]: dense takes units \(int\), bias \(bool \| None\), and {'width': 4} is not that",
        ),
        ([{"dense": [4, 5]}], r"arch.layers\[0\]: dense takes units \(int\)"),
        ([{"dense": "many"}], r"arch.layers\[0\]: dense takes units"),
        ([{"conv": [4, 3.5]}], r"arch.layers\[0\]: conv takes channels"),
        ([{"residual": [{"conv": [4, 3, 1, 1]}, "relux"]}], r"arch.layers\[0\].residual\[1\] is 'relux'"),
        ([{"conv": [4, 12]}], r"arch.layers\[0\]: Conv\(.*\) does not fit a feature map of 9x9"),
        ([{"max_pool": 0}], r"arch.layers\[0\]: MaxPool\(.*\): size and stride must be 1 or more"),
    ],
)
def test_a_list_that_is_no_net_is_refused_by_place(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row((1, 9, 9), 3, layers=layers)


def test_shortcuts_that_lead_nowhere_are_refused() -> None:
    layers = (Dense(4), Dense(4, shortcut=Shortcut(3)), Dense(3))
    with pytest.raises(ValueError, match="layer 2: its shortcut goes over 3 layers, so 1 to 2"):
        Network((4,), layers, TANH)
    with pytest.raises(ValueError, match=r"layer 2: its shortcut brings the shape \(5,\), and is added to \(4,\)"):
        Network((4,), (Dense(5), replace(layers[1], shortcut=Shortcut(1)), Dense(3)), TANH)
    with pytest.raises(ValueError, match="the last layer is linear"):
        Network((4,), (Dense(4), Dense(3, activation=TANH)), TANH)


def test_layers_may_differ_in_having_a_bias() -> None:
    net = assemble((1, 5, 5), [Conv(3, 3, bias=False), RELU, Dense(4), RELU, Dense(2)])
    assert initial_weights(net, BP(), Normal(), Normal(), seed=0).keys() == {"W1", "W2", "b2", "W3", "b3"}


def test_lenet_is_the_net_of_biotorch(configured: Callable[..., Any]) -> None:
    net: Network = configured("arch", "lenet", (1, 28, 28), 10)
    assert net.shapes == ((1, 28, 28), (6, 28, 28), (16, 10, 10), (120, 1, 1), (84,), (10,))
    assert sum(t.numel() for t in initial_weights(net, BP(), Normal(), Normal(), seed=0).values()) == 61_706


@pytest.mark.parametrize(("depth", "layers"), [(8, 8), (11, 11)])
def test_vgg_has_the_layers_that_its_name_says(depth: int, layers: int) -> None:
    for shape in ((3, 32, 32), (1, 28, 28), (1, 8, 8)):
        net = vgg(shape, 10, depth=depth, width=4, activation="relu")
        assert layers == net.L
        assert net.shapes[1] == (4, *shape[1:])


def test_resnet_has_20_layers_and_three_stages(configured: Callable[..., Any]) -> None:
    net: Network = configured("arch", "resnet", (3, 32, 32), 10)
    assert net.L == 20
    assert [net.shapes[l] for l in (1, 7, 13, 19)] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert sum(layer.shortcut is not None for layer in net.layers) == 9
    weights = sum(t.numel() for t in initial_weights(net, BP(), Normal(), Normal(), seed=0).values())
    assert weights == 269_034  # He et al. 2016, table 6: 0.27 million


def test_vit_mixes_tokens_and_takes_their_mean(configured: Callable[..., Any]) -> None:
    net: Network = configured("arch", "vit", (1, 28, 28), 10)
    assert net.layers[0].read[0] == Patches(7)
    assert net.shapes[:4] == ((1, 28, 28), (16, 64), (16, 192), (16, 64))
    assert net.L == 2 + 4 * 2


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("vgg", {"depth": 9}, "arch.depth is 9: there are VGG nets of 8 and 11 layers"),
        ("resnet", {"widths": []}, r"arch.widths is \[\]: write the width of each stage"),
        ("vit", {"depth": -1}, "arch.depth is -1: it counts blocks, so 0 or more"),
        ("vit", {"patch": 0}, r"Patches\(size=0\) needs images whose height and width it divides"),
        ("layers", {"layers": [{"group_norm": [1, -1.0]}]}, "eps is added to a variance, so 0 or more"),
        ("resnet", {"depth": 21}, r"arch.depth is 21: with 3 stages, .* as 8, 14, 20"),
        ("resnet", {"groups": 5}, "needs channels that 5 divides"),
        ("vit", {"patch": 5}, "needs images whose height and width it divides, got 28x28"),
        ("vit", {"heads": 5}, "needs tokens of 3 x heads x some features"),
        ("vit", {"activation": "tan"}, "unknown activation 'tan'"),
    ],
)
def test_keys_that_make_no_net_are_refused(name: str, keys: dict[str, Any], message: str) -> None:
    configured: Any = OmegaConf.to_container(OmegaConf.load(CONF / "arch" / f"{name}.yaml"))
    make = get_method(configured.pop("_target_"))
    with pytest.raises(ValueError, match=message):
        make((1, 28, 28), 10, **configured | keys)


def test_recompute_cuts_where_no_shortcut_leads_past() -> None:
    net = MAPPED["residual"](outputs=4, activation="tanh")
    inside = {2, 4}  # the first layer of each block, under its shortcut
    assert not inside & {*_bottoms(net)}
    assert len(_bottoms(net)) > 1
