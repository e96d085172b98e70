"""Fixed random magnitude, sign-concordant feedback."""

from dataclasses import dataclass

from nobackprop.network import Network, Weights
from nobackprop.rule import Batch, Grads
from nobackprop.rules.fa import FA


@dataclass(frozen=True)
class FRSF(FA):
    """frSF, sign symmetry: feedback alignment with the signs of W, as they are now, and fixed random magnitudes.

    Liao, Leibo & Poggio, "How important is weight symmetry in backpropagation?", AAAI 2016 (arXiv 1510.05067), its
    "fixed random magnitude sign-concordant feedbacks", `M * sign(W)`.

    `B2 ... BL` have the shapes of `W2 ... WL`; M is their absolute value.

    Departs from the paper: M is drawn by `init.backward`, and there is no batch normalization.
    """

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        B = {f"B{l}": w[f"B{l}"].abs() * w[f"W{l}"].sign() for l in range(2, net.L + 1)}
        return super().grads(net, {**w, **B}, batch)
