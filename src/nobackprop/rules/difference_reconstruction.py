"""Difference target propagation with the local difference reconstruction loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from nobackprop.core import maps
from nobackprop.core.maps import Shape
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw, Grads, Phase, Rule
from nobackprop.mistakes import Mistake
from nobackprop.rules.dtp import DTP


@dataclass(frozen=True)
class DifferenceReconstruction(Rule):
    """Difference target propagation whose decoders learn transposed Jacobians (L-DRL), so that targets are gradients.

    Ernoult, Normandin, Moudgil, Spinney, Belilovsky, Rish, Richards & Bengio, "Towards scaling difference target
    propagation by learning backprop targets", ICML 2022 (arXiv 2201.13415), and its program. A decoder G[l] leads from
    layer l to the layer below, `G[l](u) = Q[l]^T f(u)` (without f at the output). Before each step of the forward
    weights decoders take `iterations` steps down their own loss, with epsilon and xi normal of deviation sigma,

        (-2 epsilon . (G(F(h[l-1] + epsilon)) - G(h[l])) + |G(h[l] + xi) - G(h[l])|^2) / sigma^2

    where F is layer l. On average, as sigma goes to 0, that is |J_G - J_F^T|^2 up to a constant: G's Jacobian becomes
    the transpose of F's. With e[L] = eta times the error at the output, targets t = h - e come down,

        e[l-1] = G[l](h[l]) - G[l](h[l] - e[l]),   d[l] = e[l] * f'(z[l]) / eta

    and layer l descends |h[l] - t[l]|^2 / 2, which is then the gradient. Where layer l reads h[l-1] pooled, G[l] leads
    to what it reads, and e goes on through the pool as in backpropagation. `Q2 ... QL` have the shapes of `W2 ... WL`.

    Raises Mistake for an `eta` or a `sigma` of 0 or less, or `iterations` below 1.

    Departs from the paper: one sigma and one number of iterations for all layers, whose decoders take their steps side
    by side; the loss of decoders is divided by sigma^2 and gradients by eta (the paper's beta), so that rates mean what
    they do elsewhere; decoders have no biases and share the optimizer's rate, times `decoder_rate`.
    """

    family: ClassVar[str] = "targets"

    refuses: ClassVar[Mapping[str, str]] = {
        **{name: why for name, why in DTP.refuses.items() if name == "shortcut"},
        **dict.fromkeys(
            ("normalization", "attention", "activation", "dropout"),
            "its decoders answer to one product, one activation and a pool (Ernoult et al. 2022), and to nothing else",
        ),
    }

    eta: float = 0.5
    sigma: float = 0.1
    iterations: int = 5
    decoder_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.eta <= 0:
            raise Mistake(f"rule.eta is {self.eta}: it scales the step to the first target, so it must be above 0")
        if self.sigma <= 0:
            raise Mistake(f"rule.sigma is {self.sigma}: decoders learn from noise alone, so it must be above 0")
        if self.iterations < 1:
            raise Mistake(f"rule.iterations is {self.iterations}: decoders take 1 step or more before each of W's")
        if self.decoder_rate < 0:
            raise Mistake(f"rule.decoder_rate is {self.decoder_rate}: it scales the rate of Q, so 0 or more")

    def phases(self) -> tuple[Phase, ...]:
        return (*(partial(self.of_decoders, i) for i in range(self.iterations)), self.grads)

    def of_decoders(self, i: int, net: Network, w: Weights, batch: Batch) -> Grads:
        """The gradients of all Q, from the noise of the i-th iteration."""
        z, h = net.forward(w, batch.x)
        g: dict[str, Tensor] = {}
        for l in range(2, net.L + 1):
            epsilon, xi = (self.sigma * batch.noise[f"{side}{l}_{i}"] for side in ("below", "above"))
            y = z[net.L] if l == net.L else h[l]
            layer = net.layers[l - 1]
            r = maps.through(layer.read, h[l - 1])
            moved = layer.forward(w[f"W{l}"], w.get(f"b{l}"), r + epsilon)
            encoded = self._encoded(net, l, y)
            up = self._encoded(net, l, moved if l == net.L else net.f(l, moved)) - encoded
            side = self._encoded(net, l, y + xi) - encoded
            back = layer.feedback(w[f"Q{l}"], side, r)
            g[f"Q{l}"] = 2 / self.sigma**2 * (layer.hebbian(back, side)[0] - layer.hebbian(epsilon, up)[0])
        return g, None

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        e = self.eta * batch.error(z[net.L])  # (N, outputs), h - t
        g = net.hebbian(net.L, h[net.L - 1], e / self.eta)
        for l in range(net.L, 1, -1):
            change = e if l == net.L else net.difference(l, h[l], self._encoded(net, l, h[l]), e)
            e = net.feedback(l, w[f"Q{l}"], change, h[l - 1])  # (N, *shape of layer l-1)
            g |= net.hebbian(l - 1, h[l - 2], e * net.df(l - 1, z[l - 1], h[l - 1]) / self.eta)
        return g, z[net.L]

    def _encoded(self, net: Network, l: int, u: Tensor) -> Tensor:
        """What Q[l] is applied to: f(u), and u itself at the output."""
        return u if l == net.L else net.f(l, u)

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        shapes = {"below": lambda l: net.read_shapes[l], "above": lambda l: net.shapes[l]}
        return {
            f"{side}{l}_{i}": (samples, *shape(l))
            for i in range(self.iterations)
            for l in range(2, net.L + 1)
            for side, shape in shapes.items()
        }

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {f"Q{l}": draw(f"Q{l}", net.weight_shape(l)) for l in range(2, net.L + 1)}

    def gain(self, name: str) -> float:
        return self.decoder_rate if name.startswith("Q") else 1.0
