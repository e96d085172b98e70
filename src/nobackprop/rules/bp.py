"""Backpropagation: the reference, written by hand like every other rule."""

from dataclasses import dataclass

from nobackprop.network import Network, Weights
from nobackprop.rule import Batch, Grads, Rule


@dataclass(frozen=True)
class BP(Rule):
    """Backpropagation: the error reaches each layer through the transpose of the weights above it.

    Rumelhart, Hinton & Williams, "Learning representations by back-propagating errors", Nature 1986.
    """

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        d = batch.error(z[net.L])  # (N, outputs)
        g = net.hebbian(net.L, h[net.L - 1], d)
        for l in range(net.L, 1, -1):
            d = net.feedback(l, w[f"W{l}"], d, like=z[l - 1]) * net.df(z[l - 1], h[l - 1])  # (N, *shape of layer l-1)
            g |= net.hebbian(l - 1, h[l - 2], d)
        return g, z[net.L]
