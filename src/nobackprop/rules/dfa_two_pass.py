"""Direct feedback alignment without stored activations."""

from dataclasses import dataclass

from nobackprop.network import Network, Weights
from nobackprop.rule import Batch, Grads
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
        h = batch.x
        g = {}
        for l in range(1, net.L):
            z = net.preactivation(l, w, h)
            h, below = net.activation.f(z), h
            d = net.direct(w[f"B{l}"], e, like=z) * net.df(z, h)  # (N, *shape of layer l)
            g |= net.hebbian(l, below, d)
        return g | net.hebbian(net.L, h, e), logits
