"""Equilibrium propagation."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nobackprop.mistakes import Mistake
from nobackprop.network import Network, Weights
from nobackprop.rule import Batch, Grads, Rule


@dataclass(frozen=True)
class EquilibriumPropagation(Rule):
    """Equilibrium propagation: what a slight push of the outputs to their targets changes everywhere is the gradient.

    Scellier & Bengio, "Equilibrium propagation: bridging the gap between energy-based models and backpropagation",
    Frontiers in Computational Neuroscience 2017. Connections are symmetric: the hidden units relax under the layers
    below and above, in steps of `epsilon`, to a minimum of the energy plus beta times the loss. For l = 1..L-1

        h[l] += epsilon (f(W[l] h[l-1] + b[l] + W[l+1]^T h[l+1]) - h[l])

    where the outputs `z[L] = W[L] h[L-1] + b[L]` push with `-beta dloss/dh[L-1]` instead of `W[L]^T h[L]`.
    `free_steps` with beta 0, to the net's prediction z[L], then, twice from there, `nudged_steps` with +beta and with
    -beta; of the two states

        dW[l] = (h[l] h[l-1]^T at -beta  -  h[l] h[l-1]^T at +beta) / (2 beta),   dW[L] = mean of dloss/dz[L] h[L-1]^T

    and b alike, which tend to the gradient of the prediction's loss as beta goes to 0.

    Departs from the paper: it compares one sign of beta, drawn at random, with the free state; with both signs what the
    free phase left unfinished cancels. Outputs are read out and not part of the energy, for losses other than squared
    error. Both are from Laborieux et al., "Scaling equilibrium propagation to deep ConvNets by drastically reducing its
    gradient estimator bias", Frontiers in Neuroscience 2021. Units take a step to f of their input, which has the
    equilibria of the paper's `f'(s) input - s` where f is clipping (the paper's choice, to 0..1; activation `pl` clips
    to -1..1) and an energy for any non-decreasing f. Relaxation starts from the forward pass, not from where the same
    image left off.

    Large weights let the units come to rest where the input no longer matters, and then nothing is learned: start them
    smaller than for other rules (`init.forward=U0.5`), and learn more slowly.

    Raises Mistake for a `beta` of 0 or less, an `epsilon` (the share of its way that a unit goes in a step) that is
    not above 0 and at most 1, `free_steps` below 0, or `nudged_steps` below 1.
    """

    beta: float = 0.5
    epsilon: float = 0.5
    free_steps: int = 20
    nudged_steps: int = 10

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise Mistake(f"rule.beta is {self.beta}: it scales the push of the outputs, so it must be above 0")
        if not 0 < self.epsilon <= 1:
            raise Mistake(f"rule.epsilon is {self.epsilon}: a step goes part of the way, so above 0 and at most 1")
        if self.free_steps < 0:
            raise Mistake(f"rule.free_steps is {self.free_steps}: it must be 0 or more")
        if self.nudged_steps < 1:
            raise Mistake(f"rule.nudged_steps is {self.nudged_steps}: without any nothing is learned, so 1 or more")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        def error(h: Tensor) -> Tensor:
            return batch.error(net.preactivation(net.L, w, h))

        free = self._free(net, w, batch.x)
        g = {}
        for beta in (self.beta, -self.beta):

            def push(h: Tensor, beta: float = beta) -> Tensor:
                return -beta * net.feedback(net.L, w[f"W{net.L}"], error(h), like=h)

            h = self._relax(net, w, free, self.nudged_steps, push)
            each = {name: t / 2 for name, t in net.hebbian(net.L, h[-1], error(h[-1])).items()}
            for l in range(1, net.L):
                each |= {name: t / (-2 * beta) for name, t in net.hebbian(l, h[l - 1], h[l]).items()}
            g = {name: t + g.get(name, 0) for name, t in each.items()}
        return g, net.preactivation(net.L, w, free[-1])

    def logits(self, net: Network, w: Weights, x: Tensor) -> Tensor:
        return net.preactivation(net.L, w, self._free(net, w, x)[-1])

    def _free(self, net: Network, w: Weights, x: Tensor) -> list[Tensor]:
        _, h = net.forward(w, x)
        return self._relax(net, w, list(h), self.free_steps, lambda _: 0)

    def _relax(
        self, net: Network, w: Weights, h: list[Tensor], steps: int, push: Callable[[Tensor], Tensor | int]
    ) -> list[Tensor]:
        """The states h[0..L-1] after so many steps under a push of the last; h[0] is the input and stays."""
        if net.L == 1:
            return h
        first = net.preactivation(1, w, h[0])  # stays too

        def target(h: list[Tensor], l: int) -> Tensor:
            below = first if l == 1 else net.preactivation(l, w, h[l - 1])
            above = push(h[l]) if l == net.L - 1 else net.feedback(l + 1, w[f"W{l + 1}"], h[l + 1], like=h[l])
            return net.activation.f(below + above)

        for _ in range(steps):
            h = [h[0], *(h[l] + self.epsilon * (target(h, l) - h[l]) for l in range(1, net.L))]
        return h
