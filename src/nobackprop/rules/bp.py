"""Backpropagation: the reference, written by hand like every other rule."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads, Rule


@dataclass(frozen=True)
class BP(Rule):
    """Backpropagation: the error reaches each layer through the transpose of the weights above it.

    Rumelhart, Hinton & Williams, "Learning representations by back-propagating errors", Nature 1986.
    """

    family: ClassVar[str] = "exact"

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        d = self.error(z[net.L], batch)
        g, skipped = net.hebbian(net.L, h[net.L - 1], d), {}
        for l in range(net.L, 1, -1):
            e = net.feedback(l, self.down(l, w, batch), d, h[l - 1])
            e = net.joined(l - 1, e, h, skipped)  # adds what comes down shortcuts
            d = e * net.df(l - 1, z[l - 1], h[l - 1])  # (N, *shape of layer l-1)
            g |= net.hebbian(l - 1, h[l - 2], d)
        return g, z[net.L]

    def error(self, z: Tensor, batch: Batch) -> Tensor:
        """The error at the output, per sample, (N, outputs): here the loss's."""
        return batch.error(z)

    def down(self, l: int, w: Weights, batch: Batch) -> Tensor:
        """The matrix that sends errors of layer l down, in the shape of W: here W itself, used transposed."""
        return w[f"W{l}"]
