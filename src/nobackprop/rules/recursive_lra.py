"""Recursive local representation alignment."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nobackprop.core import maps
from nobackprop.core.layers import Dense
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw, Grads, Rule
from nobackprop.mistakes import Mistake
from nobackprop.rules.lra_e import LRAE


@dataclass(frozen=True)
class RecursiveLRA(Rule):
    """Recursive LRA: LRA-E with errors that skip layers, errors mixed with their signs, and an update of E of its own.

    Ororbia, Mali, Kifer & Giles, "Backpropagation-free deep learning with recursive local representation alignment",
    AAAI 2023 (arXiv 2002.03911). With e[L] the error at the output, each hidden layer l gets the target
    y[l] = f(z[l] - beta d[l]), where

        d[l] = D[l] e[L]   in every `skip`-th layer,   d[l] = E[l+1] e[l+1]   in the others
        e[l] = alpha (h[l] - y[l]) + (1 - alpha) sign(h[l] - y[l])
        dW[l] = e[l] h[l-1]^T,   dE[l+1] = -gamma d[l] e[l+1]^T,   dD[l] = -gamma d[l] e[L]^T

    `alpha` is `alpha_skip` in layers that an error skips to. Shortcuts of the net carry activations alone: no error
    comes down through them. Where a layer reads its input pooled or normalized, d comes back through that. With
    `update_E="lra_e"` E takes the step of W, as in LRA-E, and D that of weights which would lead straight to the
    output; then, without skips and with alpha = 1, this is LRA-E.

    The paper's own program was not at hand: the details (signs mixed in, by which shares; the update of E) are those of
    a public program in JAX that was written from it. `E2 ... EL` have the shapes of `W2 ... WL`, and `D` the shape
    (units that layer l + 1 reads, outputs). Raises Mistake for a `beta` of 0 or less, a `skip` or a `gamma` below 0, an
    `alpha` outside 0 to 1, or another `update_E`.

    Departs from that program: the first layer gets an error, too; the output's error is not mixed with its sign;
    updates are not cut to a largest norm, and images get no noise (`update=unit_norm` fixes the norm).
    """

    family: ClassVar[str] = "targets"

    beta: float = 0.1
    skip: int = 2
    alpha: float = 0.24
    alpha_skip: float = 0.19
    gamma: float = 0.01
    update_E: Literal["recursive", "lra_e"] = "recursive"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise Mistake(f"rule.beta is {self.beta}: it scales the error sent down, so it must be above 0")
        if self.skip < 0:
            raise Mistake(f"rule.skip is {self.skip}: 1 or more, where 2 means every second layer, or 0 for no skips")
        for name in ("alpha", "alpha_skip"):
            if not 0 <= getattr(self, name) <= 1:
                raise Mistake(f"rule.{name} is {getattr(self, name)}: it is a share of the error itself, so 0 to 1")
        if self.gamma < 0:
            raise Mistake(f"rule.gamma is {self.gamma}: it scales the rate of E, so 0 or more")
        if self.update_E not in ("recursive", "lra_e"):
            raise Mistake(f"rule.update_E is {self.update_E!r}: write recursive or lra_e")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        e = error = batch.error(z[net.L])  # (N, outputs)
        g = net.hebbian(net.L, h[net.L - 1], error)
        for l in range(net.L - 1, 0, -1):
            skipped, read = self._skipped(net, l), net.layers[l].read
            r = maps.through(read, h[l])  # what layer l + 1 reads
            name = f"D{l}" if skipped else f"E{l + 1}"
            layer, M, e = (Dense(net.units(net.L)), w[name].mT, error) if skipped else (net.layers[l], w[name], e)
            d = layer.feedback(M, e, r)
            dM = layer.hebbian(r if self.update_E == "lra_e" else -d, e)[0]
            g[name] = dM.mT if skipped else dM
            shift = self.beta * maps.pulled(read, h[l], d)
            e = self._mixed(net.difference(l, z[l], h[l], shift), self.alpha_skip if skipped else self.alpha)
            g |= net.hebbian(l, h[l - 1], e)
        return g, z[net.L]

    def _skipped(self, net: Network, l: int) -> bool:
        """Whether the output's error skips to hidden layer l; to the last one it comes anyway."""
        return self.skip > 0 and l % self.skip == 0 and l < net.L - 1

    @staticmethod
    def _mixed(e: Tensor, alpha: float) -> Tensor:
        return e if alpha == 1 else alpha * e + (1 - alpha) * torch.sign(e)

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        hidden = range(1, net.L)
        straight = {f"D{l}": draw(f"D{l}", net.head_shape(l)) for l in hidden if self._skipped(net, l)}
        return straight | {f"E{l + 1}": LRAE.drawn(net, draw, l + 1) for l in hidden if not self._skipped(net, l)}

    def gain(self, name: str) -> float:
        return self.gamma if name[0] in "ED" else 1.0
