"""Feedback alignment."""

from dataclasses import dataclass

from torch import Tensor

from nobackprop.network import Network, Weights
from nobackprop.rule import Batch, Draw, Grads, Rule


@dataclass(frozen=True)
class FA(Rule):
    """Feedback alignment: as backpropagation, with a fixed random B in the place of each W on the way down.

    Lillicrap, Cownden, Tweed & Akerman, "Random synaptic feedback weights support error backpropagation for deep
    learning", Nature Communications 2016: their `delta_h = B e`, layer by layer.

    `B2 ... BL` have the shapes of `W2 ... WL` (the paper's B is their transpose). In a convolutional layer the error
    goes down through a transposed convolution with B.
    """

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        d = batch.error(z[net.L])  # (N, outputs)
        g = net.hebbian(net.L, h[net.L - 1], d)
        for l in range(net.L, 1, -1):
            below = net.feedback(l, self.down(l, w, batch), d, like=z[l - 1])
            d = below * net.df(z[l - 1], h[l - 1])  # (N, *shape of layer l-1)
            g |= net.hebbian(l - 1, h[l - 2], d)
        return g, z[net.L]

    def down(self, l: int, w: Weights, batch: Batch) -> Tensor:
        """What stands in for W of layer l on the way down, in its shape."""
        return w[f"B{l}"]

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {f"B{l}": draw(f"B{l}", net.weight_shape(l)) for l in range(2, net.L + 1)}
