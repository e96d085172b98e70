"""Difference target propagation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nobackprop.core.maps import Shape
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw, Grads, Rule
from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class DTP(Rule):
    """Difference target propagation: targets go down through learned decoders, corrected by what these get wrong.

    Lee, Zhang, Fischer & Bengio, "Difference target propagation", ECML 2015 (arXiv 1412.7525), Algorithm 1. A decoder
    `g[l](u) = f(Q[l]^T u)` leads from layer l to layer l-1. The targets t are, for l = L-1..2:

        t[L-1] = h[L-1] - eta dloss/dh[L-1],   t[l-1] = h[l-1] - g[l](h[l]) + g[l](t[l])

    W and b of a hidden layer l descend `|h[l] - t[l]|^2`, those of the output layer descend the loss itself. Q[l]
    descends the reconstruction loss `|g[l](f(W[l] n + b[l])) - n|^2` at `n = h[l-1] + sigma noise`. `Q2 ... Q(L-1)`
    have the shapes of `W2 ... W(L-1)` (the paper's V is their transpose). In a convolutional layer the decoder is a
    transposed convolution. `eta` is a factor on the derivative of each sample's own loss. `sigma` is the standard
    deviation of the noise, in units of h.

    Raises Mistake for an `eta` of 0 or less, or a `sigma` below 0.

    Departs from the paper: decoders have no biases and take the learning rates of the forward weights. They learn in
    the same step as these. In the paper the two take turns, a whole epoch each (Bartunov et al., NeurIPS 2018, call the
    form used here parallel DTP).
    """

    family: ClassVar[str] = "targets"

    refuses: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("pooling", "normalization", "attention", "activation", "dropout"),
            "its decoders invert one product and one activation (Lee et al. 2015, Algorithm 1), and nothing else",
        ),
        "shortcut": "a target for a sum is no target for its terms (the nets of Lee et al. 2015 have no shortcuts)",
    }

    eta: float = 0.5
    sigma: float = 0.1

    def __post_init__(self) -> None:
        if self.eta <= 0:
            raise Mistake(f"rule.eta is {self.eta}: it scales the step to the first target, so it must be above 0")
        if self.sigma < 0:
            raise Mistake(f"rule.sigma is {self.sigma}: it is a standard deviation, so 0 or more")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        e = batch.error(z[net.L])  # (N, outputs)
        g = net.hebbian(net.L, h[net.L - 1], e)
        t = h[net.L - 1] - self.eta * net.feedback(net.L, w[f"W{net.L}"], e, h[net.L - 1])
        for l in range(net.L - 1, 0, -1):
            g |= net.hebbian(l, h[l - 1], 2 * (h[l] - t) * net.df(l, z[l], h[l]))
            if l > 1:
                t = h[l - 1] - self._decode(net, w, l, h[l], h[l - 1])[1] + self._decode(net, w, l, t, h[l - 1])[1]
                g[f"Q{l}"] = self._decoder_gradient(net, w, l, h[l - 1] + self.sigma * batch.noise[f"h{l - 1}"])
        return g, z[net.L]

    def _decode(self, net: Network, w: Weights, l: int, u: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The pre-activation and the output of the decoder of layer l, both shaped like (N, *shape of layer l-1)."""
        v = net.feedback(l, w[f"Q{l}"], u, like)
        return v, net.f(l - 1, v)

    def _decoder_gradient(self, net: Network, w: Weights, l: int, n: Tensor) -> Tensor:
        """The gradient of Q[l]. Q[l] takes u to v as the transposed W would, so in `hebbian` u and v change places."""
        u = net.f(l, net.preactivation(l, w, n))
        v, r = self._decode(net, w, l, u, n)
        return net.hebbian(l, 2 * (r - n) * net.df(l - 1, v, r), u)[f"W{l}"]

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        return {f"h{l - 1}": (samples, *net.shapes[l - 1]) for l in range(2, net.L)}

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {f"Q{l}": draw(f"Q{l}", net.weight_shape(l)) for l in range(2, net.L)}
