"""Kolen-Pollack learning."""

from dataclasses import dataclass

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads
from nobackprop.rules.fa import FA


@dataclass(frozen=True)
class KolenPollack(FA):
    """Kolen-Pollack learning: feedback alignment in which B takes the steps of W, so that decay makes them equal.

    Kolen & Pollack, "Backpropagation without weight transport", ICNN 1994; Akrout, Wilson, Humphreys, Lillicrap &
    Tweed, "Deep learning without weight transport", NeurIPS 2019, section 4:

        W <- (1 - lambda) W + eta A,   B <- (1 - lambda) B + eta A^T    so that    W - B^T <- (1 - lambda) (W - B^T)

    `B2 ... BL` have the shapes of `W2 ... WL` (the paper's B is their transpose). lambda is the learning rate times
    `l2` under SGD, or times the `optimizer.weight_decay` of AdamW. Without decay B keeps its distance from W.

    Departs from the paper's program: biases decay, too. In the program only W and B do.
    """

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        g, logits = super().grads(net, w, batch)
        return g | {f"B{l}": g[f"W{l}"] for l in range(2, net.L + 1)}, logits
