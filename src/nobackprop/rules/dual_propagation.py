"""Dual propagation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads, Rule
from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class DualPropagation(Rule):
    """Dual propagation: each unit has two states; their mean goes up, their difference comes down.

    Hoier, Staudt & Zach, "Dual propagation: accelerating contrastive Hebbian learning with dyadic neurons", ICML 2023
    (arXiv 2302.01228), its symmetric form (alpha = 1/2). With s = (h+ + h-) / 2 the mean of a layer's two states and
    d = h+ - h- their difference, for a nudge of size beta,

        d[L] = beta e,   z[l] = W[l] s[l-1] + b[l],   h[l]+- = f(z[l] +- W[l+1]^T d[l+1] / 2)

        dW[l] = d[l] s[l-1]^T / beta

    with e the error at the output, so that h+ is the state with the larger loss. States are found by `sweeps` up and
    down through the layers; the first starts from the forward pass, and one is enough (the paper's fastest form). No
    derivative of f is needed. As beta goes to 0 this is backpropagation. Raises Mistake for a `beta` of 0 or less, or
    `sweeps` below 1.

    Departs from the paper's program: gradients are divided by beta, so that a rate means what it does elsewhere; d is
    computed without subtracting h- from h+, the same number but for rounding; the program's factor gamma on what comes
    down is 1 here. At gamma = 1 and the squared error, the program's outputs differ as with beta = 4/3 here.
    """

    family: ClassVar[str] = "energies"

    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("normalization", "shortcut", "attention"),
        "the paper derives states for layers of a product and an activation, and its nets add pooling alone",
    )

    beta: float = 0.1
    sweeps: int = 1

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise Mistake(f"rule.beta is {self.beta}: it scales the nudge at the output, so it must be above 0")
        if self.sweeps < 1:
            raise Mistake(f"rule.sweeps is {self.sweeps}: states are found by 1 sweep or more")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, s = (list(each) for each in net.forward(w, batch.x))
        logits, d, u = z[net.L], {}, {}
        for sweep in range(self.sweeps):
            if sweep:  # up, from the mean states of the last sweep
                for l in range(1, net.L + 1):
                    z[l] = net.preactivation(l, w, s[l - 1])
                    if l < net.L:
                        s[l] = self._mean(net, l, z[l], u[l])
            d[net.L] = self.beta * batch.error(z[net.L])  # (N, outputs)
            for l in range(net.L - 1, 0, -1):
                u[l] = net.feedback(l + 1, w[f"W{l + 1}"], d[l + 1], s[l])  # (N, *shape of layer l)
                above = z[l] + u[l] / 2
                d[l] = net.difference(l, above, net.f(l, above), u[l])
                s[l] = self._mean(net, l, z[l], u[l])
        g = {name: t for l in d for name, t in net.hebbian(l, s[l - 1], d[l] / self.beta).items()}
        return g, logits

    def _mean(self, net: Network, l: int, z: Tensor, u: Tensor) -> Tensor:
        return (net.f(l, z + u / 2) + net.f(l, z - u / 2)) / 2
