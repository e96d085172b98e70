"""Batchwise random magnitude, sign-concordant feedback."""

from dataclasses import dataclass

from torch import Tensor

from nobackprop.layers import Shape
from nobackprop.network import Network, Weights
from nobackprop.rule import Batch, Draw
from nobackprop.rules.fa import FA


@dataclass(frozen=True)
class BRSF(FA):
    """brSF, sign symmetry: feedback alignment with the signs of W and magnitudes drawn anew at every step.

    Liao, Leibo & Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016 (arXiv 1510.05067), its
    "batchwise random magnitude sign-concordant feedbacks", `B = M * sign(W)`.

    Departs from the paper: M is the absolute value of normal numbers, with standard deviation `scale`, and there is no
    batch normalization; for the scale see `USF`.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"rule.scale is {self.scale}: it scales the feedback weights, so it must be above 0")

    def down(self, l: int, w: Weights, batch: Batch) -> Tensor:
        return self.scale * batch.noise[f"B{l}"].abs() * w[f"W{l}"].sign()

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        return {f"B{l}": net.weight_shape(l) for l in range(2, net.L + 1)}

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {}
