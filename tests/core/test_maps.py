"""Maps: their output against torch's, the error through them against autograd, and differences without cancellation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nobackprop.core import maps
from nobackprop.core.activations import ACTIVATIONS
from nobackprop.core.architectures import row
from nobackprop.core.initializers import Normal, initial_weights
from nobackprop.core.maps import (
    Attention,
    AvgPool,
    Dropout,
    Elementwise,
    Flatten,
    GroupNorm,
    LayerNorm,
    Map,
    Mask,
    MaxPool,
    Mean,
    Patches,
    Positions,
    Shape,
    Shrink,
)
from nobackprop.rules.bp import BP

CASES: list[tuple[Map, Shape]] = [
    (Elementwise(ACTIVATIONS["tanh"]), (3, 4)),
    (MaxPool(2), (3, 6, 7)),
    (MaxPool(3, stride=2, padding=1), (3, 6, 7)),
    (AvgPool(2), (3, 6, 7)),
    (AvgPool(3, stride=1, padding=1), (3, 4, 5)),
    (Mean(), (3, 4, 5)),
    (Mean(), (4, 5)),
    (GroupNorm(2), (4, 3, 5)),
    (LayerNorm(), (4, 6)),
    (LayerNorm(axes=3), (2, 3, 4)),
    (Attention(2), (5, 12)),
    (Attention(1, causal=True), (5, 12)),
    (Patches(2), (3, 4, 6)),
    (Positions(), (4, 5)),
    (Flatten(), (2, 3, 4)),
    (Shrink(2, 5), (3, 5, 6)),
    (Dropout(0.3), (3, 4)),
    (Mask(torch.randn(6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))), (3, 4)),
]
every_map = pytest.mark.parametrize(("m", "shape"), CASES, ids=[f"{type(m).__name__}-{len(s)}" for m, s in CASES])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every_map
def test_the_shape_is_that_of_the_output(m: Map, shape: Shape) -> None:
    assert m(_random(6, *shape)).shape == (6, *m.out_shape(shape))


@every_map
def test_the_error_at_the_input_is_autograds(m: Map, shape: Shape) -> None:
    h = _random(6, *shape).requires_grad_()
    e = _random(6, *m.out_shape(shape), seed=1)
    (expected,) = torch.autograd.grad(m(h), h, e)
    with torch.no_grad():
        torch.testing.assert_close(m.pull(h.detach(), e), expected)


@every_map
def test_samples_stay_apart(m: Map, shape: Shape) -> None:
    if isinstance(m, Mask):
        return  # one sample's own factors
    h = _random(6, *shape)
    torch.testing.assert_close(torch.cat([m(each.unsqueeze(0)) for each in h]), m(h))


@every_map
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_difference_is_the_two_outputs_apart(m: Map, shape: Shape, size: float) -> None:
    h, u = _random(6, *shape), size * _random(6, *shape, seed=2)
    torch.testing.assert_close(m.difference(h, u), m(h) - m(h - u), rtol=1e-6, atol=1e-12)


@every_map
def test_in_float32_a_tiny_difference_keeps_its_digits(m: Map, shape: Shape) -> None:
    if m.kind in ("normalization", "attention"):
        return  # these subtract their outputs
    h, u = _random(6, *shape).float(), 1e-7 * _random(6, *shape, seed=2).float()
    exact = m.difference(h.double(), u.double())
    torch.testing.assert_close(m.difference(h, u).double(), exact, rtol=1e-5, atol=1e-13)


@every_map
def test_stacked_under_vmap_is_each_alone(m: Map, shape: Shape) -> None:
    h, e = _random(3, 6, *shape), _random(3, 6, *m.out_shape(shape), seed=1)
    stacked = torch.func.vmap(lambda h, e: (m(h), m.pull(h, e), m.difference(h, h / 2)))(h, e)
    for s in range(3):
        torch.testing.assert_close([t[s] for t in stacked], [m(h[s]), m.pull(h[s], e[s]), m.difference(h[s], h[s] / 2)])


def test_outputs_are_torchs() -> None:
    image, tokens = _random(6, 4, 8, 8), _random(6, 5, 12)
    same = torch.testing.assert_close
    same(MaxPool(3, 2, 1)(image), nn.MaxPool2d(3, 2, 1)(image))
    same(AvgPool(2)(image), nn.AvgPool2d(2)(image))
    same(Mean()(image), nn.AdaptiveAvgPool2d(1)(image).flatten(1))
    same(GroupNorm(2)(image), nn.GroupNorm(2, 4, affine=False)(image))
    same(LayerNorm()(tokens), nn.LayerNorm(12, elementwise_affine=False)(tokens))
    same(Patches(4)(image), F.unfold(image, 4, stride=4).mT)
    q, k, v = (t.unflatten(2, (2, 2)).transpose(1, 2) for t in tokens.chunk(3, 2))
    for causal in (False, True):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        same(Attention(2, causal)(tokens), expected)


def test_positions_are_all_different_and_no_further_apart_than_sines_are() -> None:
    code = Positions()(torch.zeros(1, 50, 16))[0]
    assert torch.cdist(code, code).add(torch.eye(50)).min() > 0.1
    assert code.abs().max() <= 1


def test_a_row_of_maps_is_their_composition() -> None:
    row_of_them = (MaxPool(2), GroupNorm(2), Elementwise(ACTIVATIONS["tanh"]), Mean())
    h, e, u = _random(6, 4, 6, 6).requires_grad_(), _random(6, 4, seed=1), _random(6, 4, 6, 6, seed=2)
    out = maps.through(row_of_them, h)
    (expected,) = torch.autograd.grad(out, h, e)
    with torch.no_grad():
        torch.testing.assert_close(maps.pulled(row_of_them, h, e), expected)
        torch.testing.assert_close(maps.difference(row_of_them, h, u), out - maps.through(row_of_them, h - u))


def test_dropout_is_drawn_for_a_step_of_training_alone() -> None:
    net = row((20,), 3, layers=[{"dense": 2000}, "relu", {"dropout": 0.25}, {"dense": 5}, "relu", {"dropout": 0.5}])
    w = initial_weights(net, BP(), Normal(0.4), Normal(0.4), seed=0)
    x = torch.rand(7, 20, generator=torch.Generator().manual_seed(1))
    noise = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(2)) for name, shape in net.noise(7).items()
    }
    assert {name: tuple(t.shape) for name, t in noise.items()} == {"dropout2_0": (7, 2000), "dropout3_0": (7, 5)}
    trained = net.with_noise(noise)
    _, h = net.forward(w, x)
    read = maps.through(trained.layers[1].read, h[1])
    kept = read != 0
    torch.testing.assert_close(read[kept], (h[1] / 0.75)[kept])
    assert (kept.sum() / (h[1] != 0).sum() - 0.75).abs() < 0.02
    torch.testing.assert_close(
        net.logits(w, x), replace(net, layers=tuple(replace(l, read=()) for l in net.layers)).logits(w, x)
    )
    assert row((4,), 3, layers=[]).with_noise({}) == row((4,), 3, layers=[])


@pytest.mark.parametrize(
    ("m", "shape", "message"),
    [
        (MaxPool(3), (1, 2, 5), r"MaxPool\(.*\) does not fit a feature map of 2x5"),
        (AvgPool(2), (12,), r"needs images \(C, H, W\), got shape \(12,\)"),
        (Mean(), (12,), "needs images .* or tokens"),
        (GroupNorm(3), (4, 5, 5), r"needs channels that 3 divides, got shape \(4, 5, 5\)"),
        (LayerNorm(axes=3), (4, 5), "normalizes 1 to 2 axes"),
        (Attention(2), (5, 10), "needs tokens of 3 x heads x some features, got 10 features"),
        (Attention(2), (5, 10, 2), r"needs tokens \(T, 3 D\)"),
        (Patches(3), (1, 8, 9), "needs images whose height and width it divides, got 8x9"),
        (Positions(), (5,), r"needs tokens \(T, D\)"),
        (Shrink(2, 2), (3, 4, 4), "needs at most 2 channels"),
    ],
)
def test_what_does_not_fit_is_refused(m: Map, shape: Shape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        m.out_shape(shape)


def test_shares_and_sizes_that_can_not_be_are_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to less than 1"):
        Dropout(1.0)
    with pytest.raises(ValueError, match="size and stride must be 1 or more"):
        MaxPool(0)
