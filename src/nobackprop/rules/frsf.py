"""Fixed random magnitude, sign-concordant feedback."""

from dataclasses import dataclass

from torch import Tensor

from nobackprop.core.network import Weights
from nobackprop.core.rule import Batch
from nobackprop.rules.fa import FA


@dataclass(frozen=True)
class FRSF(FA):
    """frSF, sign symmetry: feedback alignment with the signs of W, as they are now, and fixed random magnitudes.

    Liao, Leibo & Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016 (arXiv 1510.05067), its
    "fixed random magnitude sign-concordant feedbacks", `M * sign(W)`.

    `B2 ... BL` have the shapes of `W2 ... WL`; M is their absolute value.

    Departs from the paper: M is drawn by `init.backward`, and there is no batch normalization.
    """

    def down(self, l: int, w: Weights, batch: Batch) -> Tensor:
        return w[f"B{l}"].abs() * w[f"W{l}"].sign()
