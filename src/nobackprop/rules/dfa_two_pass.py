"""Direct feedback alignment without stored activations."""

from dataclasses import dataclass

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads
from nobackprop.rules.dfa import DFA


@dataclass(frozen=True)
class DFATwoPass(DFA):
    """DFA that goes forward twice: once for the error, once more for each layer's gradient as the layer is reached.

    The gradients are DFA's (Nokland 2016). An error that depends on no layer above can be used on the way up, so
    no activations are stored, for one more forward pass.
    """

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        logits = net.logits(w, batch.x)
        e = batch.error(logits)  # (N, outputs)
        g, h = self.going_up(net, w, batch.x, e)
        return g | net.hebbian(net.L, h, e), logits
