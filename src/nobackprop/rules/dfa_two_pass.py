"""Direct feedback alignment without stored activations."""

from dataclasses import dataclass

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads
from nobackprop.rules.dfa import DFA


@dataclass(frozen=True)
class DFATwoPass(DFA):
    """Direct feedback alignment in two forward passes: the first gives the error, the second each layer's gradient.

    The gradients are those of DFA (Nøkland 2016). The error of a layer does not depend on the layers above it, so a
    layer's gradient can be computed on the way up. No activations are stored. This costs one more forward pass.
    """

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        logits = net.logits(w, batch.x)
        e = batch.error(logits)  # (N, outputs)
        g, h = self.going_up(net, w, batch.x, e)
        return g | net.hebbian(net.L, h, e), logits
