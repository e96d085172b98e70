"""Node perturbation."""

from dataclasses import dataclass
from typing import ClassVar

from nobackprop.core.maps import Shape
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads, Rule, each
from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class NodePerturbation(Rule):
    """Node perturbation: what noise in all units does to the loss is each unit's error.

    Werfel, Xie & Seung, "Learning curves for stochastic gradient descent in linear feedforward networks", Neural
    Computation 2005 (their "node perturbation"). A second forward pass has noise in every unit, output included,

        z'[l] = W[l] h'[l-1] + b[l] + sigma xi[l],   xi standard normal
        d[l] = (loss' - loss) / sigma * xi[l],   dW[l] = d[l] h[l-1]^T

    and the loss of each sample, a number, is all that comes back. As sigma goes to 0, d[l] is on average the gradient;
    its variance grows with the number of units. No derivative of f is needed.

    `sigma` is the standard deviation of the noise, in units of z. It must stand out from what products are rounded by,
    so a short type (bf16) needs a larger one than float32.

    Departs from the paper: its nets are linear and its loss is the squared error; nets here may have any depth,
    activation and loss. Raises Mistake for a `sigma` of 0 or less.
    """

    family: ClassVar[str] = "perturbation"

    sigma: float = 0.03

    def __post_init__(self) -> None:
        if self.sigma <= 0:
            raise Mistake(f"rule.sigma is {self.sigma}: without noise no loss changes, so it must be above 0")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        noisy, layers = {0: batch.x}, range(1, net.L + 1)
        for l in layers:
            z_noisy = net.preactivation(l, w, noisy[l - 1]) + self.sigma * batch.noise[f"z{l}"]
            noisy[l] = z_noisy if l == net.L else net.output(l, z_noisy, noisy)
        change = batch.loss.value(noisy[net.L], batch.y) - batch.loss.value(z[net.L], batch.y)  # (N,)
        d = {l: each(change / self.sigma, z[l]) * batch.noise[f"z{l}"] for l in layers}  # (N, *shape of layer l)
        return {name: t for l in layers for name, t in net.hebbian(l, h[l - 1], d[l]).items()}, z[net.L]

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        return {f"z{l}": (samples, *net.shapes[l]) for l in range(1, net.L + 1)}
