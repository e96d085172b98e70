"""Error-driven local representation alignment."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw, Grads, Rule
from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class LRAE(Rule):
    """LRA-E: each layer gets a target, its own pre-activation shifted by the error of the layer above, sent through E.

    Ororbia & Mali, "Biologically motivated algorithms for propagating local target representations", AAAI 2019
    (arXiv 1805.11703), the algorithm for LRA-E. It starts from `e[L]`, the error at the output. For l = L..2:

        d[l-1] = E[l] e[l],   y[l-1] = f(z[l-1] - beta d[l-1]),   e[l-1] = h[l-1] - y[l-1]
        dW[l] = e[l] h[l-1]^T,   dE[l] = gamma dW[l]^T

    No derivative of f is needed, so f may be the sign. `beta` scales the shift of the target, and `gamma` the learning
    rate of E. `learn_E=False` leaves E as it was drawn. `E2 ... EL` are stored in the shape of `W2 ... WL` (the paper's
    E is their transpose), so the gradient of E is that of W.

    Where a layer reads its input pooled or normalized, the shift comes back through the pool or the norm. This is
    unpublished: the paper's nets are fully connected.

    Optimizers that rescale gradients, such as AdamW, all but undo gamma. Raises Mistake for a `beta` of 0 or less,
    a `gamma` below 0, or another `difference`.

    Departs from the paper:

    - gamma is applied after the rescaling of updates (`update=unit_norm`), which would otherwise undo it.
    - `e[l-1]` is computed without subtracting y from h. The further a layer is from the output, the more equal these
      two are, so that in float32 lower layers would learn rounding noise. With 8 hidden layers the bottom one would
      learn nothing else. The number is the same except for rounding. `difference="plain"` subtracts, as the paper's
      programs do.
    """

    family: ClassVar[str] = "targets"

    refuses: ClassVar[Mapping[str, str]] = {
        "shortcut": "each layer that an error passes scales it by beta. The error from the shortcut and that from the "
        "layers beside it would be summed at different scales, and with E = W their sum is not the gradient, however "
        "small beta is (recursive LRA, Ororbia, Mali, Kifer & Giles 2023, is another rule)",
    }

    beta: float = 0.1
    gamma: float = 1.0
    learn_E: bool = True
    difference: Literal["exact", "plain"] = field(default="exact", metadata={"before": "plain"})

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise Mistake(f"rule.beta is {self.beta}: it scales the error sent down, so it must be above 0")
        if self.gamma < 0:
            raise Mistake(f"rule.gamma is {self.gamma}: it scales the rate of E, so 0 or more")
        if self.difference not in ("exact", "plain"):
            raise Mistake(f"rule.difference is {self.difference!r}: write exact, or plain for h - y as it stands")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        e = batch.error(z[net.L])  # (N, outputs)
        g = net.hebbian(net.L, h[net.L - 1], e)
        for l in range(net.L, 1, -1):
            shift = self.beta * net.feedback(l, w[f"E{l}"], e, h[l - 1])
            if self.difference == "exact":
                e = net.difference(l - 1, z[l - 1], h[l - 1], shift)  # (N, *shape of layer l-1)
            else:
                e = h[l - 1] - net.f(l - 1, z[l - 1] - shift)
            g |= net.hebbian(l - 1, h[l - 2], e)
        if self.learn_E:
            g |= {f"E{l}": g[f"W{l}"] for l in range(2, net.L + 1)}
        return g, z[net.L]

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {f"E{l}": self.drawn(net, draw, l) for l in range(2, net.L + 1)}

    @staticmethod
    def drawn(net: Network, draw: Draw, l: int) -> Tensor:
        """E[l], drawn as the paper's E, W's transpose, so that its fan-in is the number of errors that come in."""
        outputs, inputs, *kernel = net.weight_shape(l)
        return draw(f"E{l}", (inputs, outputs, *kernel)).transpose(0, 1).contiguous()

    def gain(self, name: str) -> float:
        return self.gamma if name.startswith("E") else 1.0
