"""Uniform sign-concordant feedback."""

from dataclasses import dataclass

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

    Departs from the paper: no batch normalization. Under an optimizer that rescales gradients, such as AdamW, the scale
    hardly matters; with plain SGD take one about as large as the weights. Raises Mistake for a `scale` of 0 or less.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise Mistake(f"rule.scale is {self.scale}: it scales the feedback weights, so it must be above 0")

    def down(self, l: int, w: Weights, batch: Batch) -> Tensor:
        return self.scale * w[f"W{l}"].sign()

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {}
