"""Activation functions, each with its derivative written out (training builds no autograd graph)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class Activation:
    """`h = f(z)` and, where it exists, `df(z, h)`: the derivative at z, for which h is often the cheaper input."""

    name: str
    f: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor] | None

    def df(self, z: Tensor, h: Tensor) -> Tensor:
        """The derivative of f at z, elementwise, given h = f(z).

        Raises Mistake for an activation without one.
        """
        if self.derivative is None:
            raise Mistake(
                f"activation {self.name!r} has no derivative and this rule needs one: choose a rule that does without "
                "(lra_e, pepita, equilibrium_propagation), or one of the activations "
                f"{', '.join(a for a in ACTIVATIONS if ACTIVATIONS[a].derivative)}"
            )
        return self.derivative(z, h)


def activation(name: str) -> Activation:
    """The activation of that name. Raises Mistake, with the names there are, for another one."""
    if name not in ACTIVATIONS:
        raise Mistake(f"unknown activation {name!r}: choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


# At the kinks relu, relu6 and pl take the slope 1, as the mDFA program does (torch takes 0): with all weights zero and
# relu, DFA learns under the one and stands still under the other.
ACTIVATIONS = {
    a.name: a
    for a in (
        Activation("tanh", torch.tanh, lambda z, h: torch.addcmul(h.new_ones(()), h, h, value=-1)),  # 1 - h^2
        Activation("relu", torch.relu, lambda z, h: (z >= 0).to(z.dtype)),
        Activation("pl", F.hardtanh, lambda z, h: (z.abs() <= 1).to(z.dtype)),  # piecewise linear: clip to [-1, 1]
        Activation("sigmoid", torch.sigmoid, lambda z, h: h * (1 - h)),
        Activation("softsign", F.softsign, lambda z, h: (1 - h.abs()).square()),
        Activation("relu6", F.relu6, lambda z, h: ((z >= 0) & (z <= 6)).to(z.dtype)),
        Activation("identity", lambda z: z, lambda z, h: torch.ones_like(z)),
        Activation("sign", torch.sign, None),
    )
}
