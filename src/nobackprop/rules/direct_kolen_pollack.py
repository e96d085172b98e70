"""Direct Kolen-Pollack learning."""

from dataclasses import dataclass

from torch import Tensor

from nobackprop.core.network import Network
from nobackprop.rules.dfa import DFA


@dataclass(frozen=True)
class DirectKolenPollack(DFA):
    """Direct Kolen-Pollack: direct feedback alignment in which B learns as the output's weights do.

    Webster, Choi & Ahn, "Learning the connections in direct feedback alignment" (2020, openreview zgGmAx9ZcY). B[l]
    goes to layer l straight from the output, so it takes the step of weights that would lead straight from layer l to
    the output, with e the error there, and decays as W does:

        dB[l] = h[l] e^T

    For the last hidden layer that is Kolen-Pollack learning: under SGD with decay lambda, W[L] - B[L-1]^T shrinks by
    the factor 1 - lambda at each step. For lower layers B[l] tends to weights that would lead from h[l] to the output
    in one linear step.

    lambda is the learning rate times `l2` or `optimizer.weight_decay` under SGD, or the latter of AdamW. Without decay
    B keeps its distance. `B1 ... B(L-1)` are (units of what layer l+1 reads, outputs).

    Departs from the authors' program: B takes the step of W, where there Adam moves it at a rate of its own; behind a
    pool B leads to the pooled units, where there it leads to those before.
    """

    def learned(self, net: Network, l: int, h: Tensor, e: Tensor) -> dict[str, Tensor]:
        return {f"B{l}": net.direct_hebbian(l, h, e)}
