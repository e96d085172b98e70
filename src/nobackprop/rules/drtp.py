"""Direct random target projection."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads
from nobackprop.rules.dfa import DFA


@dataclass(frozen=True)
class DRTP(DFA):
    """Direct random target projection: each hidden layer learns from the label alone, while the net goes forward.

    Frenkel, Lefebvre & Bol, "Learning without feedback: Fixed random learning signals allow for feedforward training
    of deep neural networks", Frontiers in Neuroscience 2021. DFA sends the error y - y* to each layer. Here -y*, minus
    the one-hot target, takes its place; at the label it has the sign of the error:

        d[l] = -(B[l] y*) * f'(z[l]),   and at the output the error itself

    No layer waits for those above it. Its input is freed as soon as its gradient has been computed, and a step stores
    no activations. `B1 ... B(L-1)` are (units of layer l, outputs).

    Departs from the paper's program:

    - y* is subtracted, as in the error, so that W above aligns with B and not with -B. Either is as likely a draw.
    - Hidden gradients are means over the batch, as that of the output is. The program averages the loss only at the
      output. So under plain SGD its hidden layers learn faster, by a factor of the batch size. AdamW undoes this.
    - With one output unit, y* is +-1, since a label of 0 would teach hidden layers nothing.
    """

    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("normalization", "shortcut", "attention"),
        "the paper and its program have products, activations, pooling and dropout alone",
    )

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        y = batch.y if net.units(net.L) > 1 else 2 * batch.y - 1
        g, h = self.going_up(net, w, batch.x, -y)
        z = net.preactivation(net.L, w, h)
        return g | net.hebbian(net.L, h, batch.error(z)), z
