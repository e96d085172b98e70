"""Uniform sign-concordant feedback."""

from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw
from nobackprop.mistakes import Mistake
from nobackprop.rules.fa import FA


@dataclass(frozen=True)
class USF(FA):
    """uSF, sign symmetry: feedback alignment through the signs of W, `B = scale sign(W)`.

    Liao, Leibo & Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016 (arXiv 1510.05067), its
    "uniform sign-concordant feedbacks".

    Under an optimizer that rescales gradients, such as AdamW, the scale hardly matters. With plain SGD, take one about
    as large as the weights. `scale="glorot"` is such a scale for each layer: `sqrt(2 / (fan-in + fan-out))`, the
    standard deviation of Glorot's initial weights, as in BioTorch's program.

    Departs from the paper: there is no batch normalization.

    Raises Mistake for a `scale` of 0 or less, or another word.
    """

    scale: float | Literal["glorot"] = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.scale, str) and self.scale != "glorot":
            raise Mistake(f"rule.scale is {self.scale!r}: write a number above 0, or glorot")
        if not isinstance(self.scale, str) and self.scale <= 0:
            raise Mistake(f"rule.scale is {self.scale}: it scales the feedback weights, so it must be above 0")

    def down(self, l: int, w: Weights, batch: Batch) -> Tensor:
        W = w[f"W{l}"]
        if isinstance(self.scale, str):
            fans = (W.shape[0] + W.shape[1]) * prod(W.shape[2:])
            return (2 / fans) ** 0.5 * W.sign()
        return self.scale * W.sign()

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {}
