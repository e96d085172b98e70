"""Torch modules as nets, and back: they compute the same; what can't be taken is told with its place."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import options
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from nobackprop.core.activations import ACTIVATIONS, Activation, activation
from nobackprop.core.architectures import assemble, resnet, row, vgg, vit
from nobackprop.core.initializers import Normal, initial_weights
from nobackprop.core.layers import Conv, Dense, Shortcut, Tokens
from nobackprop.core.maps import (
    Attention,
    AvgPool,
    Dropout,
    Elementwise,
    GroupNorm,
    Map,
    MaxPool,
    Mean,
    Patches,
    Positions,
    Shape,
    Shrink,
)
from nobackprop.core.modules import MapModule, ResidualModule, from_torch, to_torch
from nobackprop.core.network import Network, allconv, mlp
from nobackprop.mistakes import Mistake
from nobackprop.rules.bp import BP

PATCHES, POSITIONS, ATTENTION = MapModule(Patches(4)), MapModule(Positions()), MapModule(Attention(heads=2))


def plain_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(2, channels, affine=False)


def plain_layer_norm(*shape: int) -> nn.LayerNorm:
    return nn.LayerNorm([*shape], elementwise_affine=False)


def residual(channels: int, out: int, stride: int) -> ResidualModule:
    first = nn.Conv2d(channels, out, 3, stride, padding=1)
    second = nn.Conv2d(out, out, 3, padding=1, bias=False)
    return ResidualModule(plain_norm(channels), nn.ReLU(inplace=True), first, plain_norm(out), nn.ReLU(), second)


class Head(nn.Sequential):
    """A class of nn.Sequential that does the same."""

    def __init__(self, inputs: int) -> None:
        super().__init__(OrderedDict(dropout=nn.Dropout(0.3), fully_connected=nn.Linear(inputs, 4)))


MODULES: dict[str, tuple[Shape, list[nn.Module]]] = {
    "one layer": ((6,), [nn.Linear(6, 4)]),
    "linear layers without biases": ((6,), [nn.Linear(6, 5, bias=False), nn.Linear(5, 5), nn.Linear(5, 4, bias=False)]),
    "every activation": (
        (6,),
        [
            *[nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Hardtanh(), nn.Linear(6, 6), nn.Hardtanh(0, 1)],
            *[nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.Softsign(), nn.Linear(6, 6), nn.ReLU6()],
            *[nn.Linear(6, 6), nn.ELU(), nn.Linear(6, 6), nn.LeakyReLU()],
            *[nn.Identity(), nn.Linear(6, 6), MapModule(Elementwise(activation("sign"))), nn.Linear(6, 4)],
        ],
    ),
    "activations before and after one another": (
        (6,),
        [nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.ReLU(), nn.Linear(5, 4)],
    ),
    "lenet": (
        (1, 12, 12),
        [
            nn.Sequential(nn.Conv2d(1, 3, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.AvgPool2d(3, 1, padding=1), nn.Tanh()),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Identity(), nn.Sequential(nn.ReLU()), Head(6)),
        ],
    ),
    "groups, dilation and global pooling": (
        (2, 9, 7),
        [
            *[nn.Conv2d(2, 4, 3, dilation=2, groups=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
            *[nn.Dropout(0.2), nn.Linear(4, 4)],
        ],
    ),
    "norms of images": (
        (2, 5, 4),
        [plain_layer_norm(2, 5, 4), nn.Conv2d(2, 4, 3), plain_norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)],
    ),
    "residual": (
        (2, 7, 7),
        [
            *[nn.Conv2d(2, 4, 3, padding=1), residual(4, 4, 1), residual(4, 6, 2), plain_norm(6), nn.ReLU()],
            *[nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(6, 4)],
        ],
    ),
    "residual blocks within others, and behind maps": (
        (6,),
        [
            *[nn.Linear(6, 5), nn.Tanh(), plain_layer_norm(5)],
            ResidualModule(
                ResidualModule(nn.ReLU(), nn.Linear(5, 5), nn.Tanh()),
                ResidualModule(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 5)),
                *[nn.ReLU(), nn.Linear(5, 5), nn.Sigmoid()],
            ),
            *[ResidualModule(nn.Linear(5, 5)), nn.Linear(5, 4)],
        ],
    ),
    "an activation at the head of a block behind a bare layer": (
        (6,),
        [nn.Linear(6, 5), ResidualModule(nn.Tanh(), nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 4)],
    ),
    "flattened images into a block": (
        (1, 2, 3),
        [nn.Flatten(), ResidualModule(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 4)],
    ),
    "vit": (
        (3, 8, 8),
        [
            *[PATCHES, nn.Linear(48, 6), POSITIONS],
            ResidualModule(plain_layer_norm(6), nn.Linear(6, 18), ATTENTION, nn.Dropout(0.2), nn.Linear(6, 6)),
            ResidualModule(plain_layer_norm(6), nn.Linear(6, 9), nn.ReLU(), MapModule(Dropout(0.1)), nn.Linear(9, 6)),
            *[plain_layer_norm(6), MapModule(Mean()), nn.Linear(6, 4)],
        ],
    ),
    "tokens, all of them into the output": ((3, 5), [nn.Linear(5, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 4)]),
}


@pytest.fixture(params=MODULES)
def made(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Shape]:
    """A module in evaluation, and the shape of its inputs."""
    shape, parts = copy.deepcopy(MODULES[request.param])
    return nn.Sequential(*parts).eval(), shape


def inputs(shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def weights(net: Network) -> dict[str, Tensor]:
    """Random ones in float64, biases too."""
    generator = torch.Generator().manual_seed(2)
    w = initial_weights(net, BP(), Normal(0.4), Normal(0.4), seed=0)
    return {name: t.double() + torch.randn(t.shape, generator=generator) / 4 for name, t in w.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_a_module_its_net_and_the_module_made_of_this_give_the_same(
    made: tuple[nn.Sequential, Shape], dtype: torch.dtype, tolerance: float
) -> None:
    module, shape = made
    module.to(dtype)
    x = inputs(shape, dtype)
    net, w = from_torch(module, shape)
    again = to_torch(net, w).eval()
    torch.testing.assert_close(net.logits(w, x), module(x), rtol=0, atol=tolerance)
    torch.testing.assert_close(again(x), module(x), rtol=0, atol=tolerance)


def test_the_way_there_and_back_changes_nothing(made: tuple[nn.Sequential, Shape]) -> None:
    net, w = from_torch(*made)
    other, u = from_torch(to_torch(net, w), net.in_shape)
    assert other == net
    assert other.describe() == net.describe()
    assert Network.from_description(net.describe()) == net
    assert w.keys() == u.keys()
    assert all(torch.equal(w[name], u[name]) for name in w)


ASSEMBLED = {
    "row": row((2, 9, 8), 4, layers=[{"conv": [4, 3]}, "sign", {"avg_pool": [3, 2, 1]}, "relu", {"dense": 5}, "pl"]),
    "vgg": vgg((3, 8, 8), 4, depth=8, width=3, activation="hard_sigmoid"),
    "resnet": resnet((3, 8, 8), 4, depth=10, widths=[2, 4], groups=2, activation="relu"),
    "vit": vit((3, 8, 8), 4, patch=4, width=6, depth=2, heads=3, hidden=5, dropout=0.2, activation="softsign"),
    "causal": assemble((3, 5), [Tokens(6), Attention(1, causal=True), Tokens(2), Mean(), Dense(4)]),
}


@pytest.mark.parametrize("net", ASSEMBLED.values(), ids=ASSEMBLED)
def test_an_assembled_net_comes_back_as_it_was(net: Network) -> None:
    w = weights(net)
    module = to_torch(net, w | {"B1": torch.zeros(1)}).eval()
    x = inputs(net.in_shape)
    torch.testing.assert_close(module(x), net.logits(w, x), rtol=0, atol=1e-12)
    other, u = from_torch(module, net.in_shape)
    assert other == net
    assert all(torch.equal(w[name], u[name]) for name in w | u)


@pytest.mark.parametrize(
    "net",
    [
        mlp((1, 3, 4), 4, hidden=[6, 5], activation="pl", bias=False),
        allconv((2, 8, 7), 4, filters=[[3, 3, 1], [4, 3, 2, 1]], activation="sign"),
    ],
    ids=["mlp", "allconv"],
)
def test_a_net_of_one_activation_comes_back_with_each_layers_own(net: Network) -> None:
    w = weights(net)
    other, u = from_torch(to_torch(net, w), net.in_shape)
    assert [type(layer) for layer in other.layers] == [type(layer) for layer in net.layers]
    assert {layer.activation for layer in other.layers} == {net.activation, None}
    assert [other.has_bias(l) for l in range(1, net.L + 1)] == [net.bias] * net.L
    torch.testing.assert_close(other.logits(u, inputs(net.in_shape)), net.logits(w, inputs(net.in_shape)))


@pytest.mark.parametrize("name", [name for name in options("arch") if name != "module"])
def test_every_net_of_the_configs_is_a_module(name: str, configured: Callable[..., Any]) -> None:
    shape = (3, 224, 224) if name.endswith("224") else (3, 32, 32)
    net: Network = configured("arch", name, shape, 4)
    w = initial_weights(net, BP(), Normal(0.02), Normal(), seed=0)
    x = inputs(shape, torch.float32)[:1]
    with torch.no_grad():
        torch.testing.assert_close(to_torch(net, w).eval()(x), net.logits(w, x), rtol=0, atol=1e-6)


def test_the_weights_are_copies() -> None:
    module = nn.Sequential(nn.Linear(6, 4))
    net, w = from_torch(module, (6,))
    again = to_torch(net, w)
    w["W1"].zero_()
    assert all(p.any() for p in module.parameters())
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), again.parameters(), strict=True))
    assert all(p.requires_grad for p in again.parameters())
    assert not any(t.requires_grad for t in w.values())


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_torch_exports_the_module_for_any_number_of_samples(name: str) -> None:
    shape, parts = copy.deepcopy(MODULES[name])
    net, w = from_torch(nn.Sequential(*parts), shape)
    module = to_torch(net, w).eval()
    x = inputs(shape, torch.float32)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    for some in (x, x[:3]):
        torch.testing.assert_close(exported.module()(some), module(some))


def test_dropout_is_drawn_in_training_alone() -> None:
    h = torch.ones(1000, 8)
    for module in (MapModule(Dropout(0.25)), to_torch(assemble((8,), [Dropout(0.25), Dense(8)]), EYE)):
        dropped = module(h)
        torch.testing.assert_close(dropped[dropped != 0].unique(), torch.tensor([4 / 3]))
        assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.03)
        assert torch.equal(module.eval()(h), h)


EYE = {"W1": torch.eye(8), "b1": torch.zeros(8)}
SHARED = nn.Linear(5, 5)
TIED = nn.Linear(5, 5)
TIED.weight = SHARED.weight
BIASED = nn.Linear(6, 5)
BIASED.bias = SHARED.bias
PRUNED = prune.l1_unstructured(nn.Linear(6, 4), "weight", 2)
VECTOR, IMAGE, TOKENS = (6,), (4, 8, 8), (3, 6)
END = "it must end with nn.Linear, without an activation, on one row of features a sample"


class Own(nn.Module):
    """A module with a forward of its own, and modules in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)


@pytest.mark.parametrize(
    ("shape", "parts", "told"),
    [
        (
            VECTOR,
            [nn.Linear(6, 5), nn.GELU()],
            r"^module\.1, GELU\(.*can't be taken; allowed are nn.Linear, nn.Conv",
        ),
        (
            VECTOR,
            [nn.Sequential(nn.Linear(6, 5), nn.Softmax(1))],
            r"^module\.0\.1, Softmax\(dim=1\): .*the loss app",
        ),
        (
            VECTOR,
            [nn.Sequential(nn.Tanh(), Own())],
            r"^module\.0\.1, Own: can't be taken; allowed are .* in an nn",
        ),
        (IMAGE, [nn.BatchNorm2d(4)], r"^module\.0, BatchNorm2d\(.*each other, and has a state; use nn\.GroupNorm\("),
        (VECTOR, [ResidualModule(nn.Linear(6, 6), nn.BatchNorm1d(6))], r"^module\.0\.1, BatchNorm1d\("),
        (
            TOKENS,
            [nn.MultiheadAttention(6, 2)],
            r"^module\.0, MultiheadAttention: .*MapModule\(nobackprop\.Attent",
        ),
        (VECTOR, [], rf"^the module is empty: {END}"),
        (VECTOR, [nn.Linear(6, 4), nn.Tanh()], rf"^the module ends with module\.1, Tanh\(\): {END}"),
        (VECTOR, [nn.Linear(6, 4), nn.Dropout()], rf"module\.1, Dropout.*: {END}"),
        (IMAGE, [nn.Conv2d(4, 4, 8), nn.Flatten()], rf"module\.1, Flatten.*: {END}"),
        (TOKENS, [nn.Linear(6, 4)], rf"module\.0, Linear.*: {END}"),
        (VECTOR, [ResidualModule(nn.Linear(6, 6))], rf"module\.0, ResidualModule: {END}"),
        (
            IMAGE,
            [nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Linear(6, 4)],
            r"^module\.2, Linear.*: put nn\.Flatten\(\) before",
        ),
        (IMAGE, [nn.Linear(8, 4)], r"^module\.0, Linear.*: put nn\.Flatten\(\) before it"),
        (VECTOR, [nn.Linear(7, 4)], r"^module\.0, .* shape \(4, 7\); what comes from .* shape \(6,\), needs \(4, 6\)"),
        (IMAGE, [nn.Conv2d(3, 4, 3)], r"^module\.0, .* shape \(4, 3, 3, 3\); .* \(4, 8, 8\), needs \(4, 4, 3, 3\)"),
        (VECTOR, [nn.Conv2d(3, 4, 3)], r"^module\.0, Conv2d.* needs images \(C, H, W\), got shape \(6,\)"),
        (IMAGE, [nn.Conv2d(4, 4, 9)], r"^module\.0, Conv2d.* does not fit a feature map of 8x8"),
        (IMAGE, [nn.MaxPool2d(9)], r"^module\.0, MaxPool2d.* does not fit a feature map of 8x8"),
        (
            VECTOR,
            [nn.Linear(6, 5), SHARED, nn.Tanh(), SHARED],
            r"^module\.3, Linear.*: stands twice in the module",
        ),
        (VECTOR, [nn.Linear(6, 5), SHARED, nn.Tanh(), TIED], r"^module\.3, Linear.*: stands twice in the module"),
        (VECTOR, [BIASED, nn.Tanh(), SHARED], r"^module\.2, Linear.*: stands twice in the module, or its weights do"),
        (VECTOR, [parametrizations.weight_norm(nn.Linear(6, 4))], r"^module\.0, ParametrizedLinear: can't be taken"),
        (VECTOR, [PRUNED], r"^module\.0, Linear.*: its weight is computed from others \(by pruning or weight norm\)"),
        (VECTOR, [nn.LeakyReLU(0.2)], r"^module\.0, LeakyReLU.*can't be taken; negative_slope must be 0.01, got 0.2"),
        (VECTOR, [nn.ELU(0.5)], r"^module\.0, ELU.*can't be taken; alpha must be 1.0, got 0.5"),
        (VECTOR, [nn.Hardtanh(0, 2)], r"^module\.0, Hardtanh.*can't be taken; nn\.Hardtanh\(\) clips to -1\.\.1, nn"),
        (IMAGE, [nn.Flatten(2)], r"^module\.0, Flatten.*can't be taken; start_dim must be 1, got 2"),
        (IMAGE, [nn.Conv2d(4, 4, (3, 2))], r"^module\.0, Conv2d.*kernel_size must be one number for both .* \(3, 2\)"),
        (IMAGE, [nn.Conv2d(4, 4, 3, padding="same")], r"^module\.0, Conv2d.*padding must be one number .* 'same'"),
        (IMAGE, [nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")], r"^module\.0, .*the padding must be zeros"),
        (IMAGE, [nn.MaxPool2d((2, 1))], r"^module\.0, MaxPool2d.*kernel_size must be one number for both axes"),
        (IMAGE, [nn.MaxPool2d(3, ceil_mode=True)], r"^module\.0, MaxPool2d.*ceil_mode must be False, got True"),
        (IMAGE, [nn.MaxPool2d(3, dilation=2)], r"^module\.0, MaxPool2d.*dilation must be 1, got 2"),
        (IMAGE, [nn.MaxPool2d(2, return_indices=True)], r"^module\.0, MaxPool2d.*return_indices must be False"),
        (IMAGE, [nn.AvgPool2d(3, count_include_pad=False)], r"^module\.0, AvgPool2d.*count_include_pad must be True"),
        (IMAGE, [nn.AvgPool2d(3, divisor_override=2)], r"^module\.0, AvgPool2d.*divisor_override must be None, got 2"),
        (IMAGE, [nn.AdaptiveAvgPool2d(1), nn.ReLU()], r"^module\.0, Adaptive.*without nn\.Flatten\(\) right behind it"),
        (IMAGE, [nn.AdaptiveAvgPool2d(2), nn.Flatten()], r"^module\.0, Adaptive.*only as nn\.AdaptiveAvgPool2d\(1\)"),
        (
            IMAGE,
            [nn.GroupNorm(2, 4)],
            r"^module\.0, GroupNorm.*no rule here trains: write nn\.GroupNorm\(2, 4, aff",
        ),
        (IMAGE, [nn.GroupNorm(2, 6, affine=False)], r"^module\.0, GroupNorm.*normalizes 6 channels, .* \(4, 8, 8\)"),
        (
            VECTOR,
            [nn.LayerNorm(6)],
            r"^module\.0, LayerNorm.*: write nn\.LayerNorm\(6, elementwise_affine=False\)",
        ),
        (IMAGE, [nn.LayerNorm([8, 8])], r"^module\.0, LayerNorm.*: write nn\.LayerNorm\(\(8, 8\), elementwise_affine="),
        (VECTOR, [plain_layer_norm(5)], r"^module\.0, LayerNorm.*normalizes a shape \(5,\), and .* the shape \(6,\)"),
        (VECTOR, [nn.Dropout(1.0)], r"^module\.0, Dropout.*rate is a share of the values"),
        (IMAGE, [nn.Dropout2d()], r"^module\.0, Dropout2d.*can't be taken"),
        (
            VECTOR,
            [ATTENTION],
            r"^module\.0, MapModule\(Attention\(heads=2, .* needs tokens \(T, 3 D\), got shape",
        ),
        (IMAGE, [MapModule(Patches(3))], r"^module\.0, MapModule\(Patches\(size=3\)\).* needs images whose height"),
        (
            VECTOR,
            [ResidualModule(nn.Linear(6, 5)), nn.Linear(5, 4)],
            r"^module\.0, Residual.*: .* makes \(5,\) of \(6",
        ),
        (VECTOR, [ResidualModule(nn.Tanh()), nn.Linear(6, 4)], r"^module\.0, ResidualModule: .* ends with a layer"),
        (
            VECTOR,
            [ResidualModule(ResidualModule(nn.Linear(6, 5)), nn.Linear(6, 6)), nn.Linear(6, 4)],
            r"^module\.0\.0, ResidualModule: .* makes \(5,\) of \(6,\)",
        ),
        (
            VECTOR,
            [ResidualModule(ResidualModule(nn.Linear(6, 6))), nn.Linear(6, 4)],
            r"^module\.0, ResidualModule: a residual block can't end with another one",
        ),
        (
            VECTOR,
            [nn.Dropout(), ResidualModule(nn.Linear(6, 6)), nn.Linear(6, 4)],
            r"^module\.1, ResidualModule: a shortcut can't lead through dropout: put dropout into the residual block",
        ),
        (
            VECTOR,
            [ResidualModule(nn.Dropout(), nn.ReLU(inplace=True), nn.Linear(6, 6)), nn.Linear(6, 4)],
            r"^module\.0\.1, ReLU\(inplace=True\): it would change what the block's output is added to: leave out",
        ),
    ],
)
def test_what_a_module_must_not_hold_is_told_with_its_place(shape: Shape, parts: list[nn.Module], told: str) -> None:
    with pytest.raises(Mistake, match=told):
        from_torch(nn.Sequential(*parts), shape)


class Twofold(ResidualModule):
    """A class of ResidualModule that does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_module_that_is_no_sequence_is_told_as_a_whole() -> None:
    assert from_torch(nn.Linear(6, 4), (6,))[0].L == 1
    with pytest.raises(Mistake, match=r"^module\.0, Twofold: can't be taken; allowed are"):
        from_torch(nn.Sequential(Twofold(nn.Linear(6, 6)), nn.Linear(6, 4)), (6,))
    with pytest.raises(Mistake, match=r"^module, Own: can't be taken; allowed are"):
        from_torch(Own(), (6,))


def test_a_block_that_does_not_fit_is_told_when_it_is_used() -> None:
    with pytest.raises(Mistake, match=r"makes \(5,\) of \(6,\)"):
        ResidualModule(nn.Linear(6, 5))(torch.zeros(2, 6))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"W1": None}, r"among the weights W1 is not there: this net needs one of shape \(5, 6\)"),
        (
            {"W2": torch.zeros(4, 6)},
            r"among the weights W2 has the shape \(4, 6\): .* needs one of shape \(4, 5\)",
        ),
        ({"b2": torch.zeros(4, 1)}, r"among the weights b2 has the shape \(4, 1\): .* shape \(4,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused(changed: dict[str, Tensor | None], told: str) -> None:
    net = mlp((6,), 4, hidden=[5], activation="tanh")
    w = {name: t for name, t in (weights(net) | changed).items() if t is not None}
    with pytest.raises(Mistake, match=told):
        to_torch(net, w)


def linear(*shortcuts: Shortcut | None, read: tuple[Map, ...] = ()) -> Network:
    layers = [Dense(6, shortcut=shortcut) for shortcut in shortcuts]
    return Network((6,), (replace(layers[0], read=read), *layers[1:], Dense(4)), ACTIVATIONS["tanh"])


def test_an_activation_of_ones_own_stays_what_it_is() -> None:
    own = Activation("tanh", torch.sin, lambda z, h: z.cos())
    net = assemble((6,), [Dense(5), own, Dense(4)])
    w, x = weights(net), inputs((6,))
    torch.testing.assert_close(to_torch(net, w)(x), net.logits(w, x), rtol=0, atol=1e-12)
    assert from_torch(to_torch(net, w), (6,))[0] == net


@dataclass(frozen=True)
class Twice(Dense):
    """A layer of a user's own."""


@pytest.mark.parametrize(
    ("net", "told"),
    [
        (linear(None, Shortcut(2), Shortcut(2)), "layers 2 and 3: their shortcuts cross"),
        (linear(Shortcut(1, (Elementwise(activation("relu")),))), r"layer 1: Shortcut\(over=1, .* leads through other"),
        (linear(Shortcut(1), Shortcut(2, (Elementwise(activation("relu")),))), "layer 2: Shortcut"),
        (Network((6,), (Twice(5), Dense(4)), ACTIVATIONS["tanh"]), r"layer 1: there is no torch module for Twice"),
    ],
)
def test_a_net_that_no_module_is_is_refused(net: Network, told: str) -> None:
    with pytest.raises(Mistake, match=told):
        to_torch(net, weights(net))


def test_a_shortcut_of_another_shape_is_the_one_that_a_block_makes() -> None:
    strided = Conv(4, kernel=3, stride=2, padding=1)

    def net(*maps: Map, read: tuple[Map, ...] = ()) -> Network:
        layers = replace(strided, read=read, shortcut=Shortcut(1, maps)), Dense(4)
        return Network((2, 4, 4), layers, ACTIVATIONS["identity"])

    norm = GroupNorm(2)
    for same in (net(Shrink(2, 4)), net(norm, Shrink(2, 4), read=(norm,)), net(Shrink(2, 4), read=(norm,))):
        x, w = inputs((2, 4, 4)), weights(same)
        torch.testing.assert_close(to_torch(same, w)(x), same.logits(w, x), rtol=0, atol=1e-12)
    for other in (net(AvgPool(2), Shrink(1, 4)), net(MaxPool(1), Shrink(2, 4), read=(norm,)), net(Shrink(3, 4))):
        with pytest.raises(Mistake, match="other maps than those with which layer 1 begins to read"):
            to_torch(other, weights(other))
