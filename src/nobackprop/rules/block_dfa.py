"""Direct feedback alignment to blocks of layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw, Grads, Rule
from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class BlockDFA(Rule):
    """DFA to the ends of blocks of layers, and backpropagation within a block.

    Launay, Poli, Boniface & Krzakala, "Direct feedback alignment scales to modern deep learning tasks and
    architectures", NeurIPS 2020. At the layers l of `ends` the error is the output's, sent through a fixed random B. It
    replaces all that comes from above. At the other layers the error comes down from the layer above, and down
    shortcuts, as in backpropagation:

        e[l] = B[l] e  at an end,   e[l] = W[l+1]^T d[l+1]  within a block,   d[l] = e[l] * f'(z[l])

    `ends: null` means the outputs of residual blocks. In a transformer these are the outputs of attention and of the
    feed-forward layers. In a net without shortcuts it means every hidden layer, which is DFA. The paper's "micro" form
    has the hidden feed-forward layer as a third end of each block (`DFALayer`s in transformer.py of
    lightonai/dfa-scales-to-modern-deep-learning). Its "macro" form has only the end of each whole block. Raises Mistake
    for an end that is no hidden layer.

    All tokens share B, as in the paper's program; `arch.own_feedback: true` gives each token a B of its own.

    Departs from the program: B has its own weights for each end, and `init.backward` says what they are drawn from. The
    program cuts all of them from one matrix, uniform in +-1.
    """

    family: ClassVar[str] = "aligned feedback"

    ends: Sequence[int] | None = None

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        d = e = batch.error(z[net.L])  # (N, outputs)
        g = net.hebbian(net.L, h[net.L - 1], e)
        ends, skipped = self._ends(net), {}
        for l in range(net.L - 1, 0, -1):
            if l in ends:
                skipped.pop(l, None)
                below = net.direct(l, w[f"B{l}"], e, h[l])
            else:
                below = net.feedback(l + 1, w[f"W{l + 1}"], d, h[l])
            d = net.joined(l, below, h, skipped) * net.df(l, z[l], h[l])  # (N, *shape of layer l)
            g |= net.hebbian(l, h[l - 1], d)
        return g, z[net.L]

    def stand_ins(self, net: Network, w: Weights, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {f"B{l}": draw(f"B{l}", net.direct_shape(l)) for l in self._ends(net)}

    def _ends(self, net: Network) -> Sequence[int]:
        hidden = range(1, net.L)
        if self.ends is None:
            return [l for l in hidden if net.layers[l - 1].shortcut] or hidden
        if strange := [l for l in self.ends if l not in hidden]:
            raise Mistake(f"rule.ends has {strange}: this net's hidden layers are 1 to {net.L - 1}")
        return self.ends
