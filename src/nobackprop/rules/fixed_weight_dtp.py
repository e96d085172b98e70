"""Difference target propagation with fixed weights in its decoders."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw, Grads, Rule
from nobackprop.mistakes import Mistake
from nobackprop.rules.dtp import DTP


@dataclass(frozen=True)
class FixedWeightDTP(Rule):
    """Difference target propagation whose decoders stay as they were drawn.

    Shibuya, Inoue, Kawakami & Sato, "Fixed-weight difference target propagation", AAAI 2023 (arXiv 2212.10352), and its
    program. With decoders `g[l](u) = f(Q[l]^T u)` from layer l to the layer below, and the output itself as the first
    layer that has a target,

        t[L] = z[L] - eta e,   t[l-1] = h[l-1] - g[l](h[l]) + g[l](t[l])

    each layer descends |h[l] - t[l]|^2 / 2. Weights align with decoders, as they do in feedback alignment. As eta goes
    to 0, h[l-1] - t[l-1] is h[l] - t[l], sent through the decoder's Jacobian. With linear f and Q = W that is
    backpropagation.

    `Q2 ... QL` have the shapes of `W2 ... WL`. `eta` is a factor on the derivative of each sample's own loss. Raises
    Mistake for an `eta` of 0 or less.

    Departs from the paper: no batch norm, with which its nets learn best, and which its program has in decoders and
    targets, too; gradients are divided by eta, so that rates mean what they do elsewhere (the program's rate r, for
    |h - t|^2 without the half, is 2 r eta here); h - t is carried down without subtracting, the same number but for
    rounding.
    """

    family: ClassVar[str] = "targets"

    refuses: ClassVar[Mapping[str, str]] = DTP.refuses

    eta: float = 0.05

    def __post_init__(self) -> None:
        if self.eta <= 0:
            raise Mistake(f"rule.eta is {self.eta}: it scales the step to the first target, so it must be above 0")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        e = self.eta * batch.error(z[net.L])  # (N, outputs), h - t
        g = net.hebbian(net.L, h[net.L - 1], e / self.eta)
        for l in range(net.L, 1, -1):
            below = h[l - 1]
            v, change = (net.feedback(l, w[f"Q{l}"], u, below) for u in (z[l] if l == net.L else h[l], e))
            e = net.difference(l - 1, v, net.f(l - 1, v), change)  # (N, *shape of layer l-1)
            g |= net.hebbian(l - 1, h[l - 2], e * net.df(l - 1, z[l - 1], below) / self.eta)
        return g, z[net.L]

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {f"Q{l}": draw(f"Q{l}", net.weight_shape(l)) for l in range(2, net.L + 1)}
