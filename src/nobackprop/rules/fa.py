"""Feedback alignment."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw
from nobackprop.rules.bp import BP


@dataclass(frozen=True)
class FA(BP):
    """Feedback alignment: backpropagation in which errors come down through a fixed random B instead of each W.

    Lillicrap, Cownden, Tweed & Akerman, "Random synaptic feedback weights support error backpropagation for deep
    learning", Nature Communications 2016: their `delta_h = B e`, layer by layer.

    `B2 ... BL` have the shapes of `W2 ... WL` (the paper's B is their transpose). In a convolutional layer the error
    goes down through a transposed convolution with B.
    """

    family: ClassVar[str] = "aligned feedback"

    def down(self, l: int, w: Weights, batch: Batch) -> Tensor:
        return w[f"B{l}"]

    def stand_ins(self, net: Network, w: Weights, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
        return {l: (self.down(l, w, batch), w[f"W{l}"]) for l in range(2, net.L + 1)}

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {f"B{l}": draw(f"B{l}", net.weight_shape(l)) for l in range(2, net.L + 1)}
