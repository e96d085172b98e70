"""Direct feedback alignment."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw, Grads, Rule


@dataclass(frozen=True)
class DFA(Rule):
    """Direct feedback alignment: the output's error reaches every hidden layer at once through a fixed random B.

    Nøkland, "Direct feedback alignment provides learning in deep neural networks", NeurIPS 2016:
    `d[l] = (B[l] e) * f'(z[l])`, with e the error at the output.

    `B1 ... B(L-1)` are (units of layer l, outputs); a convolutional layer's units are all its channels and positions.
    All tokens of a layer share B, which is then (features, outputs), as in the program of Launay et al. 2020
    (`batch_dims` in tinydfa/dfa.py). They share W, which can't align with a different B for each;
    `arch.own_feedback: true` has that.
    """

    family: ClassVar[str] = "aligned feedback"

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        e = batch.error(z[net.L])  # (N, outputs)
        g = net.hebbian(net.L, h[net.L - 1], e)
        for l in range(net.L - 1, 0, -1):
            d = net.direct(l, w[f"B{l}"], e, h[l]) * net.df(l, z[l], h[l])  # (N, *shape of layer l)
            g |= net.hebbian(l, h[l - 1], d) | self.learned(net, l, h[l], e)
        return g, z[net.L]

    def learned(self, net: Network, l: int, h: Tensor, e: Tensor) -> dict[str, Tensor]:
        """The gradient of B[l], by name, where it learns: here it does not."""
        return {}

    def going_up(self, net: Network, w: Weights, x: Tensor, e: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The gradients of all hidden layers from an error e (N, outputs) that is known beforehand, and h[L-1].

        A layer's input is freed as soon as its gradient has been computed.
        """
        h, g = {0: x}, {}
        for l in range(1, net.L):
            z = net.preactivation(l, w, h[l - 1])
            h[l] = net.output(l, z, h)
            d = net.direct(l, w[f"B{l}"], e, h[l]) * net.df(l, z, h[l])  # (N, *shape of layer l)
            g |= net.hebbian(l, h[l - 1], d)
            h.pop(l - net.span, None)
        return g, h[net.L - 1]

    def stand_ins(self, net: Network, w: Weights, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
        """B[l] stands in for the product of the weights above layer l, where those layers are dense."""
        found, above = {}, torch.eye(net.units(net.L)).to(w["W1"])  # (units, outputs)
        for l in range(net.L - 1, 0, -1):
            if net.layers[l].spatial or net.layers[l].read or net.layers[l].shortcut:
                break
            above = w[f"W{l + 1}"].mT @ above
            found[l] = w[f"B{l}"], above
        return found

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {f"B{l}": draw(f"B{l}", net.direct_shape(l)) for l in range(1, net.L)}
