"""Activation functions, each with its derivative and its difference written out (training builds no autograd graph)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class Activation:
    """An activation function f with its derivative, where it has one, and its difference `f(z) - f(z - u)`.

    `df` and `difference` take h = f(z) besides z, since many of them are cheaper to compute from h.
    """

    name: str
    f: Callable[[Tensor], Tensor] = field(repr=False)
    derivative: Callable[[Tensor, Tensor], Tensor] | None = field(repr=False)
    without_cancellation: Callable[[Tensor, Tensor, Tensor], Tensor] | None = field(default=None, repr=False)

    def df(self, z: Tensor, h: Tensor) -> Tensor:
        """The derivative of f at z, elementwise, given h = f(z).

        Raises Mistake for an activation without one.
        """
        if self.derivative is None:
            raise Mistake(
                f"activation {self.name!r} has no derivative and this rule needs one: choose a rule that does without "
                "(such as lra_e, pepita, equilibrium_propagation, evolution), or one of the activations "
                f"{', '.join(a for a in ACTIVATIONS if ACTIVATIONS[a].derivative)}"
            )
        return self.derivative(z, h)

    def difference(self, z: Tensor, h: Tensor, u: Tensor) -> Tensor:
        """f(z) - f(z - u), elementwise, given h = f(z). It is exact also where the two are nearly equal.

        Subtracting the two would leave a rounding error of the size of h's. Here the rounding error is that of the
        difference itself. Under tanh and sigmoid it is u times the rounding error of h, as for the derivative, so it
        matters only where f is flat.
        """
        if self.without_cancellation is None:
            return h - self.f(z - u)
        return self.without_cancellation(z, h, u)


def activation(name: str) -> Activation:
    """The activation of that name. Raises Mistake, which lists all names, for a name that it does not know."""
    if name not in ACTIVATIONS:
        raise Mistake(f"unknown activation {name!r}: choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _one_minus(a: Tensor, b: Tensor) -> Tensor:
    return torch.addcmul(a.new_ones(()), a, b, value=-1)  # 1 - a b


def _tanh_difference(z: Tensor, h: Tensor, u: Tensor) -> Tensor:
    return torch.tanh(u) * _one_minus(h, torch.tanh(z - u))


def _sigmoid_difference(z: Tensor, h: Tensor, u: Tensor) -> Tensor:
    y = torch.sigmoid(z - u)
    return torch.tanh(u / 2) * torch.addcmul(h + y, h, y, value=-2)  # tanh's, as sigmoid(z) = (1 + tanh(z / 2)) / 2


def _softsign_difference(z: Tensor, h: Tensor, u: Tensor) -> Tensor:
    v = z - u
    y = F.softsign(v)
    # The last part is exactly 0 where z and v have the same sign. It matters where their signs differ.
    return u / (1 + z.abs()) / (1 + v.abs()) + (h * y.abs() - y * h.abs())


def _relu_difference(z: Tensor, h: Tensor, u: Tensor) -> Tensor:
    return torch.minimum(u - (z - h), h)  # clips at 0 alone


def _leaky_difference(z: Tensor, h: Tensor, u: Tensor) -> Tensor:
    above = _relu_difference(z, torch.relu(z), u)  # the part of u that is above 0
    return torch.add(above, u - above, alpha=SLOPE)


def _elu_difference(z: Tensor, h: Tensor, u: Tensor) -> Tensor:
    above = _relu_difference(z, torch.relu(z), u)
    below = u - above
    size = torch.exp(torch.maximum(z, z - u).clamp(max=0)) * -torch.expm1(-below.abs())
    return above + torch.copysign(size, below)


def _clip(z: Tensor) -> Tensor:
    return z.clamp(0, 1)


def _clipped_difference(low: float, high: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The difference of clipping to low..high: u without the part of it that lies beyond an end."""
    return lambda z, h, u: torch.clamp(u - (z - h), h - high, h - low)


SLOPE = 0.01  # of leaky_relu below 0, torch's default

# At their kinks relu, leaky_relu, relu6 and pl have the slope 1, as in the mDFA program, where torch's have the one
# below. It matters when all weights start at zero: with relu, DFA then learns if the slope is 1, and stands still if it
# is 0.
ACTIVATIONS = {
    a.name: a
    for a in (
        Activation("tanh", torch.tanh, lambda z, h: _one_minus(h, h), _tanh_difference),
        Activation("relu", torch.relu, lambda z, h: (z >= 0).to(z.dtype), _relu_difference),
        Activation(
            "leaky_relu",
            lambda z: F.leaky_relu(z, SLOPE),
            lambda z, h: torch.where(z >= 0, z.new_ones(()), SLOPE),
            _leaky_difference,
        ),
        Activation("elu", F.elu, lambda z, h: (h + 1).clamp(max=1), _elu_difference),
        # piecewise linear: clip to [-1, 1]
        Activation("pl", F.hardtanh, lambda z, h: (z.abs() <= 1).to(z.dtype), _clipped_difference(-1, 1)),
        # clip to [0, 1], as the program of equilibrium propagation does (torch's hardsigmoid is another function)
        Activation("hard_sigmoid", _clip, lambda z, h: ((z >= 0) & (z <= 1)).to(z.dtype), _clipped_difference(0, 1)),
        Activation("sigmoid", torch.sigmoid, lambda z, h: h * (1 - h), _sigmoid_difference),
        Activation("softsign", F.softsign, lambda z, h: (1 - h.abs()).square(), _softsign_difference),
        Activation("relu6", F.relu6, lambda z, h: ((z >= 0) & (z <= 6)).to(z.dtype), _clipped_difference(0, 6)),
        Activation("identity", lambda z: z, lambda z, h: torch.ones_like(z), lambda z, h, u: u),
        Activation("sign", torch.sign, None),
    )
}
