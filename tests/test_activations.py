"""Every activation and its derivative against torch and autograd, and the slopes at the kinks."""

import pytest
import torch
import torch.nn.functional as F

from nobackprop.activations import ACTIVATIONS, activation

WITH_DERIVATIVE = [name for name, a in ACTIVATIONS.items() if a.derivative is not None]


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("tanh", torch.tanh),
        ("relu", F.relu),
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
    torch.testing.assert_close(derivative, expected)
    assert derivative.dtype == z.dtype


@pytest.mark.parametrize(("name", "kink"), [("relu", 0), ("pl", -1), ("pl", 1), ("relu6", 0), ("relu6", 6)])
def test_the_slope_at_a_kink_is_1(name: str, kink: float) -> None:
    a = activation(name)
    z = torch.tensor([float(kink)])
    assert a.df(z, a.f(z)).item() == 1


def test_an_activation_without_derivative_says_what_to_do() -> None:
    z = torch.zeros(1)
    message = r"'sign' has no derivative and this rule needs one: .*\(lra_e, pepita, .*\).*tanh, relu, pl.*identity$"
    with pytest.raises(ValueError, match=message):
        activation("sign").df(z, z)


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match=f"unknown activation 'gelu': choose one of {', '.join(ACTIVATIONS)}"):
        activation("gelu")
