"""Equilibrium propagation."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nobackprop.layers import Shape
from nobackprop.network import Network, Weights
from nobackprop.rule import Batch, Grads, Rule


@dataclass(frozen=True)
class EquilibriumPropagation(Rule):
    """Equilibrium propagation: what a slight push of the outputs to their targets changes everywhere is the gradient.

    Scellier & Bengio, "Equilibrium propagation: bridging the gap between energy-based models and backpropagation",
    Frontiers in Computational Neuroscience 2017. Connections are symmetric: units relax under the layers below and
    above, in steps of `epsilon`, to a minimum of the energy plus beta times the loss,

        h[l] += epsilon (f(W[l] h[l-1] + b[l] + W[l+1]^T h[l+1]) - h[l])
        h[L] += epsilon (W[L] h[L-1] + b[L] - beta dloss/dh[L] - h[L])

    `free_steps` with beta 0, to the net's prediction h[L], then `nudged_steps` from there with beta; then

        dW[l] = (h[l] h[l-1]^T  free  -  h[l] h[l-1]^T  nudged) / beta,   db[l] = (h[l] free - h[l] nudged) / beta

    which tends to the gradient of the prediction's loss as beta goes to 0. The sign of beta is drawn at every step.

    Departs from the paper: units take the step to f of their input, which has the equilibria of the paper's
    `f'(s) input - s` where f is clipping (the paper's choice, here activation `pl`) and an energy for any
    non-decreasing f; outputs are linear, for any loss; relaxation starts from the forward pass, not from where the same
    image left off an epoch ago. An unbounded f, such as relu, may run away.
    """

    beta: float = 0.5
    epsilon: float = 0.5
    free_steps: int = 20
    nudged_steps: int = 10

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"rule.beta is {self.beta}: it scales the push of the outputs, so it must be above 0")
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"rule.epsilon is {self.epsilon}: a step goes part of the way, so above 0 and at most 1")
        if self.free_steps < 0:
            raise ValueError(f"rule.free_steps is {self.free_steps}: it must be 0 or more")
        if self.nudged_steps < 1:
            raise ValueError(f"rule.nudged_steps is {self.nudged_steps}: without any nothing is learned, so 1 or more")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        beta = self.beta * batch.noise["sign"].sign()  # (1,)
        free = self._free(net, w, batch.x)
        nudged = self._relax(net, w, free, self.nudged_steps, lambda out: beta * batch.error(out))
        g = {}
        for l in range(1, net.L + 1):
            before, after = net.hebbian(l, free[l - 1], free[l]), net.hebbian(l, nudged[l - 1], nudged[l])
            g |= {name: (before[name] - after[name]) / beta for name in before}
        return g, free[net.L]

    def logits(self, net: Network, w: Weights, x: Tensor) -> Tensor:
        return self._free(net, w, x)[net.L]

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        return {"sign": (1,)}

    def _free(self, net: Network, w: Weights, x: Tensor) -> list[Tensor]:
        z, h = net.forward(w, x)
        return self._relax(net, w, [*h, z[net.L]], self.free_steps, lambda out: 0)

    def _relax(
        self, net: Network, w: Weights, h: list[Tensor], steps: int, push: Callable[[Tensor], Tensor | int]
    ) -> list[Tensor]:
        """The states h[0..L] after so many steps; h[0] is the input and stays."""

        def from_below(h: list[Tensor], l: int) -> Tensor:
            return net.layers[l - 1].forward(w[f"W{l}"], w.get(f"b{l}"), h[l - 1])

        first = from_below(h, 1)  # stays too

        def target(h: list[Tensor], l: int) -> Tensor:
            below = first if l == 1 else from_below(h, l)
            if l == net.L:
                return below - push(h[l])
            return net.activation.f(below + net.feedback(l + 1, w[f"W{l + 1}"], h[l + 1], like=h[l]))

        for _ in range(steps):
            h = [h[0], *(h[l] + self.epsilon * (target(h, l) - h[l]) for l in range(1, net.L + 1))]
        return h
