"""Zeroth-order optimization: simultaneous perturbation and evolution strategies."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import Tensor

from nobackprop.core.maps import Shape
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads, Rule
from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class Evolution(Rule):
    """Zeroth-order optimization: the loss of two opposite changes of all weights says how far to go that way.

    Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation" (SPSA), IEEE
    TAC 1992, as Malladi et al., "Fine-tuning language models with just forward passes" (MeZO), NeurIPS 2023, use it:
    for v[k] standard normal, k = 1..K,

        g = mean over k of (loss(w + sigma v[k]) - loss(w - sigma v[k])) / (2 sigma) * v[k]

    With K above 1 this is an evolution strategy with antithetic pairs (Salimans et al., "Evolution strategies as a
    scalable alternative to reinforcement learning", arXiv 1703.03864, 2017). With a `rank` r, changes of matrices and
    kernels are `A B^T / sqrt(r)` with A (outputs, r) and B (inputs, r), as Sarkar et al., "Evolution strategies at the
    hyperscale" (EGGROLL), arXiv 2511.16652 (2025), draw them; their covariance is the same, and 2 r numbers a row and
    column are drawn in the place of one a weight. On average g is the gradient, up to terms in sigma squared. No
    derivative of anything is needed, and no activation is stored.

    Raises Mistake for a `sigma` of 0 or less, and a `population` or a `rank` below 1.

    Departs from MeZO: all K changes of a step are held at once, K times the weights, where MeZO draws each anew from
    its seed to save memory. Departs from EGGROLL: the products with A and B are not kept apart, so that a step on a GPU
    saves no memory; nor are losses ranked or normalized.
    """

    family: ClassVar[str] = "perturbation"

    sigma: float = 0.01
    population: int = 10
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.sigma <= 0:
            raise Mistake(f"rule.sigma is {self.sigma}: without a change no loss changes, so it must be above 0")
        if self.population < 1:
            raise Mistake(f"rule.population is {self.population}: how many pairs of changes, so 1 or more")
        if self.rank is not None and self.rank < 1:
            raise Mistake(f"rule.rank is {self.rank}: 1 or more, or null for changes of full rank")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        g: dict[str, Tensor] = {}
        for k in range(self.population):
            v = self._change(net, batch.noise, k)
            up, down = (self._loss(net, w, v, s * self.sigma, batch) for s in (1, -1))
            slope = (up - down) / (2 * self.sigma * self.population)
            g = {name: g[name] + slope * t if g else slope * t for name, t in v.items()}
        return g, None

    def _loss(self, net: Network, w: Weights, v: Mapping[str, Tensor], step: float, batch: Batch) -> Tensor:
        z = net.logits({name: w[name] + step * t for name, t in v.items()}, batch.x)
        return batch.loss.value(z, batch.y).mean()

    def _change(self, net: Network, noise: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """The k-th direction, by the names of the weights."""
        if self.rank is None:
            return {name: noise[name][k] for name in net.weight_shapes}
        v = {}
        for name, shape in net.weight_shapes.items():
            if len(shape) == 1:
                v[name] = noise[name][k]
            else:
                v[name] = (noise[f"{name}_rows"][k] @ noise[f"{name}_columns"][k].mT / self.rank**0.5).view(shape)
        return v

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        drawn: dict[str, Shape] = {}
        for name, shape in net.weight_shapes.items():
            if self.rank is None or len(shape) == 1:
                drawn[name] = (self.population, *shape)
            else:
                drawn[f"{name}_rows"] = (self.population, shape[0], self.rank)
                drawn[f"{name}_columns"] = (self.population, prod(shape[1:]), self.rank)
        return drawn
