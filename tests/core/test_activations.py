"""Every activation, its derivative and its difference against torch, autograd and float64; the slopes at the kinks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nobackprop.core.activations import ACTIVATIONS, activation

WITH_DERIVATIVE = [name for name, a in ACTIVATIONS.items() if a.derivative is not None]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("tanh", torch.tanh),
        ("relu", F.relu),
        ("leaky_relu", lambda z: torch.maximum(z, z / 100)),
        ("elu", lambda z: torch.where(z > 0, z, torch.exp(z) - 1)),
        ("pl", lambda z: z.clamp(-1, 1)),
        ("sigmoid", lambda z: 1 / (1 + torch.exp(-z))),
        ("softsign", lambda z: z / (1 + z.abs())),
        ("relu6", lambda z: z.clamp(0, 6)),
        ("identity", lambda z: z),
        ("sign", torch.sign),
    ],
)
def test_values(name: str, function) -> None:
    z = torch.linspace(-8, 8, 101, dtype=torch.float64)
    torch.testing.assert_close(activation(name).f(z), function(z))


@pytest.mark.parametrize("name", WITH_DERIVATIVE)
def test_derivative_is_autograds_away_from_kinks(name: str) -> None:
    a = activation(name)
    z = torch.linspace(-7.93, 7.93, 200, dtype=torch.float64, requires_grad=True)  # hits none of -1, 0, 1 and 6
    h = a.f(z)
    (expected,) = torch.autograd.grad(h.sum(), z)
    derivative = a.df(z.detach(), h.detach())
    torch.testing.assert_close(derivative, expected, rtol=1e-12, atol=1e-15)
    assert derivative.dtype == z.dtype


@pytest.mark.parametrize(
    ("name", "kink"), [("relu", 0), ("leaky_relu", 0), ("elu", 0), ("pl", -1), ("pl", 1), ("relu6", 0), ("relu6", 6)]
)
def test_the_slope_at_a_kink_is_1(name: str, kink: float) -> None:
    a = activation(name)
    z = torch.tensor([float(kink)])
    assert a.df(z, a.f(z)).item() == 1


ENDS = {
    "relu": (0.0, torch.inf),
    "relu6": (0.0, 6.0),
    "pl": (-1.0, 1.0),
    "hard_sigmoid": (0.0, 1.0),
    "identity": (-torch.inf, torch.inf),
}


def _everywhere() -> tuple[Tensor, Tensor]:
    """Pairs of z and u of both signs, from 1e-7 to 1e4 and 0, in float32."""
    size = torch.logspace(-7, 4, 67)
    z, u = torch.meshgrid(*[torch.cat([-size.flip(0), torch.zeros(1), size])] * 2, indexing="ij")
    return z.flatten(), u.flatten()


def _expected(name: str, z: Tensor, u: Tensor) -> Tensor:
    """f(z) - f(z - u) in float64, by forms that do not cancel there."""
    z, u = z.double(), u.double()
    v = z - u
    if name in ("tanh", "sigmoid"):
        scale = 1.0 if name == "tanh" else 0.5
        high, low = 2 * scale * torch.maximum(z, v), 2 * scale * torch.minimum(z, v)
        size = -2 * scale * torch.expm1(-2 * scale * u.abs()) * torch.sigmoid(high) * torch.sigmoid(-low)
        return u.sign() * size
    if name == "softsign":
        apart = F.softsign(z) - F.softsign(v)
        return torch.where(z * v < 0, apart, u / ((1 + z.abs()) * (1 + v.abs())))
    if name == "sign":
        return z.sign() - v.sign()
    if name in ("leaky_relu", "elu"):
        above = _expected("relu", z, u)
        below = u - above
        size = torch.maximum(z, v).clamp(max=0).exp() * -torch.expm1(-below.abs())
        return above + (below / 100 if name == "leaky_relu" else below.sign() * size)
    low, high = ENDS[name]
    h = z.clamp(low, high)
    return torch.clamp(u - (z - h), h - high, h - low)


def _right(name: str, z: Tensor, u: Tensor, found: Tensor) -> Tensor:
    """Where a difference has the digits that float32 can hold."""
    expected, shift = _expected(name, z, u), torch.tanh(u.double()).abs()
    allowed = 4e-6 * expected.abs() + 1e-38
    if name in ("tanh", "sigmoid"):  # where f is flat, to the rounding of f times u
        allowed = torch.where(expected.abs() < 0.05 * shift, allowed + 2e-7 * shift, allowed)
    return (found - expected).abs() <= allowed


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_difference_is_what_subtracting_gives(name: str) -> None:
    z, u = (t.double() for t in _everywhere())
    z, u = (t[(z.abs() < 20) & (u.abs() < 20)] for t in (z, u))
    a = activation(name)
    torch.testing.assert_close(a.difference(z, a.f(z), u), a.f(z) - a.f(z - u), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_difference_in_float32_is_that_of_float64(name: str) -> None:
    (z, u), a = _everywhere(), activation(name)
    found = a.difference(z, a.f(z), u)
    assert _right(name, z, u, found).all()
    assert not found[u == 0].any()
    subtracted = a.f(z) - a.f(z - u)
    assert (name == "sign") == bool(_right(name, z, u, subtracted).all())


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_difference_is_the_same_stacked_and_compiled(name: str, backend: str) -> None:
    torch.compiler.reset()
    (z, u), a = _everywhere(), activation(name)
    h = a.f(z)
    stacked = torch.func.vmap(a.difference)(*(t.unflatten(0, (-1, 27)) for t in (z, h, u)))
    assert torch.equal(stacked.flatten(), a.difference(z, h, u))
    assert _right(name, z, u, torch.compile(a.difference, backend=backend, fullgraph=True)(z, h, u)).all()


def test_an_activation_without_derivative_says_what_to_do() -> None:
    z = torch.zeros(1)
    message = r"'sign' has no derivative and this rule needs one: .*such as lra_e, .*tanh, relu, leaky_relu.*identity$"
    with pytest.raises(ValueError, match=message):
        activation("sign").df(z, z)


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match=f"unknown activation 'gelu': choose one of {', '.join(ACTIVATIONS)}"):
        activation("gelu")
