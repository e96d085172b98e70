"""Batchwise random magnitude, sign-concordant feedback."""

from dataclasses import dataclass

from torch import Tensor

from nobackprop.core.maps import Shape
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch
from nobackprop.rules.usf import USF


@dataclass(frozen=True)
class BRSF(USF):
    """brSF, sign symmetry: feedback alignment with the signs of W and magnitudes drawn anew at every step.

    Liao, Leibo & Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016 (arXiv 1510.05067), its
    "batchwise random magnitude sign-concordant feedbacks", `B = M * sign(W)`.

    Departs from the paper: M is the absolute value of normal numbers with standard deviation `scale`, and there is no
    batch normalization. What `USF` says of the scale holds here, too.
    """

    def down(self, l: int, w: Weights, batch: Batch) -> Tensor:
        return batch.noise[f"B{l}"].abs() * super().down(l, w, batch)

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        return {f"B{l}": net.weight_shape(l) for l in range(2, net.L + 1)}
