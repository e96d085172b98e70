"""Equilibrium propagation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads, Rule
from nobackprop.mistakes import Mistake

STEPS = 10  # a hidden layer, of either phase, where the config leaves them to the depth


@dataclass(frozen=True)
class EquilibriumPropagation(Rule):
    """Equilibrium propagation: a slight push of the outputs to their targets changes every state, which trains the net.

    Scellier & Bengio, "Equilibrium propagation: bridging the gap between energy-based models and backpropagation",
    Frontiers in Computational Neuroscience 2017. Connections are symmetric. The hidden units relax, under the layers
    below and above, to a minimum of the energy plus beta times the loss. A step for l = 1..L-1 is

        h[l] += epsilon (f(W[l] h[l-1] + b[l] + W[l+1]^T h[l+1]) - h[l])

    The last hidden layer gets the push `-beta dloss/dh[L-1]` instead of `W[L]^T h[L]`. The loss is that of the outputs
    `z[L] = W[L] h[L-1] + b[L]`. In the free phase beta is 0; `free_steps` steps lead to the net's prediction z[L]. Two
    nudged phases of `nudged_steps` steps start there, one with +beta and one with -beta. The gradients are

        dW[l] = (h[l] h[l-1]^T at -beta  -  h[l] h[l-1]^T at +beta) / (2 beta),   dW[L] = dloss/dz[L] h[L-1]^T, free

    and those of b alike. As beta goes to 0 they tend to the gradient of the prediction's loss.

    The states of the two nudged phases are nearly equal, and the more so the lower the layer. So their difference D is
    not made by subtracting. It relaxes beside h, the states at -beta, by the activation's `difference`:

        D[l] += epsilon (f(input at -beta) - f(input at +beta) - D[l])

    So beta may be as small as the limit needs it. The paper's program takes 0.5 and 1. That push is not slight where
    units have a kink: with 8 layers of relu the updates are then at 77 to 89 degrees to the gradient, and with 0.0001
    at 15 to 27. `difference="plain"` subtracts the states, which in float32 leaves lower layers with rounding noise;
    dW[L] is then the mean over both pushes.

    Steps that are None suit the depth: each phase has 10 for each hidden layer. They bring small weights (`U0.5`) to
    rest to one part in a thousand, and let the push reach the bottom. The paper's program takes 20, 150 and 500 free
    and 4, 6 and 8 nudged steps for 1, 2 and 3 hidden layers. The diagnostics say how far the states are from rest
    (`unrest/h...`).

    Large weights let the units come to rest, slowly, where the input no longer matters. Then nothing is learned. So
    start the weights smaller than for other rules (`init.forward=U0.5`), and learn more slowly. With 8 hidden layers
    this happens within 20 steps of AdamW at 0.001: the gradient then falls tenfold with each layer from the top down,
    to 1e-8 at the bottom. (The program starts from `glorot_uniform` and has a learning rate for each layer, up to 64
    times as large at the bottom as at the top.)

    Pooling is part of the energy, as in Laborieux et al. (below). What a pooled layer sends down comes back through the
    pool. With max pooling the position of the largest may change again and again, and then the states never come to
    rest. With mean pooling they do.

    Raises Mistake for a `beta` of 0 or less, an `epsilon` (the share of its way that a unit goes in a step) that is
    not above 0 and at most 1, `free_steps` below 0, `nudged_steps` below 1, or another `difference`.

    Departs from the paper:

    - The paper compares the free state with a state at one sign of beta, which is drawn at random. Here both signs are
      compared, and what the free phase left unfinished cancels. The outputs are read out and are no part of the energy,
      so that losses other than squared error can be used. Both are from Laborieux et al., "Scaling equilibrium
      propagation to deep ConvNets by drastically reducing its gradient estimator bias", Frontiers in Neuroscience 2021.
    - Units take a step to f of their input, where the paper's follow `f'(s) input - s`. The equilibria are the same
      where f clips to 0..1, which is the paper's choice (activation `hard_sigmoid`). There is an energy for any f that
      does not decrease.
    - Relaxation starts from the forward pass. In the paper's program it starts where the same image left off, and at
      first from 0.
    """

    family: ClassVar[str] = "energies"

    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("normalization", "shortcut", "attention", "activation"),
        "the energies of its papers have products and pooling alone (Laborieux et al. 2021, section 2)",
    )

    beta: float = 0.0001
    epsilon: float = 0.5
    free_steps: int | None = None
    nudged_steps: int | None = None
    difference: Literal["exact", "plain"] = field(default="exact", metadata={"before": "plain"})

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise Mistake(f"rule.beta is {self.beta}: it scales the push of the outputs, so it must be above 0")
        if not 0 < self.epsilon <= 1:
            raise Mistake(f"rule.epsilon is {self.epsilon}: a step goes part of the way, so above 0 and at most 1")
        if self.free_steps is not None and self.free_steps < 0:
            raise Mistake(
                f"rule.free_steps is {self.free_steps}: it must be 0 or more, or null for what suits the depth"
            )
        if self.nudged_steps is not None and self.nudged_steps < 1:
            raise Mistake(
                f"rule.nudged_steps is {self.nudged_steps}: without any nothing is learned, so 1 or more, or null for "
                "what suits the depth"
            )
        if self.difference not in ("exact", "plain"):
            raise Mistake(f"rule.difference is {self.difference!r}: write exact, or plain to subtract the states")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        free = self._free(net, w, batch.x)
        z = net.preactivation(net.L, w, free[-1])
        if self.difference == "plain":
            return self._subtracted(net, w, batch, free), z
        h, D = self._nudged(net, w, batch, free)
        g = net.hebbian(net.L, free[-1], batch.error(z))
        for l in range(1, net.L):
            each = net.hebbian(l, h[l - 1], D[l])
            if l > 1:  # h[l] h[l-1]^T differs by both factors
                read = net.read_difference(l, h[l - 1], D[l - 1])
                each[f"W{l}"] = each[f"W{l}"] + net.layers[l - 1].hebbian(read, h[l] - D[l])[0]
            g |= {name: t / (2 * self.beta) for name, t in each.items()}
        return g, z

    def logits(self, net: Network, w: Weights, x: Tensor) -> Tensor:
        return net.preactivation(net.L, w, self._free(net, w, x)[-1])

    def measured(self, net: Network, w: Weights, batch: Batch) -> dict[str, Tensor]:
        """How far from rest the free states are: what a whole step would change, relative to them."""
        h = self._free(net, w, batch.x)
        below = _from_below(net, w, net.preactivation(1, w, h[0]), h)
        drawn_to = self._targets(net, _inputs(net, w, below, h, h, 0))
        return {f"unrest/h{l}": (drawn_to[l] - h[l]).norm() / h[l].norm() for l in range(1, net.L)}

    def _free(self, net: Network, w: Weights, x: Tensor) -> list[Tensor]:
        _, h = net.forward(w, x)
        return self._relax(net, w, list(h), self._steps(net, self.free_steps), lambda _: 0)

    def _steps(self, net: Network, steps: int | None) -> int:
        if net.L == 1:
            return 0  # nothing relaxes
        return STEPS * (net.L - 1) if steps is None else steps

    def _targets(self, net: Network, z: Sequence[Tensor]) -> list[Tensor]:
        return [z[0], *(net.f(l, z[l]) for l in range(1, net.L))]

    def _relax(
        self, net: Network, w: Weights, h: list[Tensor], steps: int, push: Callable[[Tensor], Tensor | int]
    ) -> list[Tensor]:
        """The states h[0..L-1] after so many steps under a push of the last; h[0] is the input and stays."""
        first = net.preactivation(1, w, h[0])  # stays too
        for _ in range(steps):
            targets = self._targets(net, _inputs(net, w, _from_below(net, w, first, h), h, h, push(h[-1])))
            h = [h[0], *(h[l] + self.epsilon * (targets[l] - h[l]) for l in range(1, net.L))]
        return h

    def _nudged(self, net: Network, w: Weights, batch: Batch, free: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The states under -beta, and D, how far from them those under +beta are."""
        h, D = free, [torch.zeros_like(t) for t in free]
        first = net.preactivation(1, w, h[0])
        none = torch.zeros_like(first)

        def push(e: Tensor, last: Tensor) -> Tensor:
            return self.beta * net.feedback(net.L, w[f"W{net.L}"], e, last)

        for _ in range(self._steps(net, self.nudged_steps)):
            e, other = (batch.error(net.preactivation(net.L, w, last)) for last in (h[-1], h[-1] - D[-1]))
            z = _inputs(net, w, _from_below(net, w, first, h), h, h, push(e, h[-1]))
            below = [D[0], none, *(net.preactivation_difference(l, w, h[l - 1], D[l - 1]) for l in range(2, net.L))]
            u = _inputs(net, w, below, D, h, push(e + other, h[-1]))
            targets = self._targets(net, z)
            moved = [net.difference(l, z[l], targets[l], u[l]) for l in range(1, net.L)]
            D = [D[0], *(D[l] + self.epsilon * (moved[l - 1] - D[l]) for l in range(1, net.L))]
            h = [h[0], *(h[l] + self.epsilon * (targets[l] - h[l]) for l in range(1, net.L))]
        return h, D

    def _subtracted(self, net: Network, w: Weights, batch: Batch, free: list[Tensor]) -> dict[str, Tensor]:
        def error(h: Tensor) -> Tensor:
            return batch.error(net.preactivation(net.L, w, h))

        g = {}
        for beta in (self.beta, -self.beta):

            def push(h: Tensor, beta: float = beta) -> Tensor:
                return -beta * net.feedback(net.L, w[f"W{net.L}"], error(h), h)

            h = self._relax(net, w, free, self._steps(net, self.nudged_steps), push)
            each = {name: t / 2 for name, t in net.hebbian(net.L, h[-1], error(h[-1])).items()}
            for l in range(1, net.L):
                each |= {name: t / (-2 * beta) for name, t in net.hebbian(l, h[l - 1], h[l]).items()}
            g = {name: t + g.get(name, 0) for name, t in each.items()}
        return g


def _from_below(net: Network, w: Weights, first: Tensor, h: Sequence[Tensor]) -> list[Tensor]:
    """What reaches each hidden layer from below: `first` the first one."""
    return [h[0], first, *(net.preactivation(l, w, h[l - 1]) for l in range(2, net.L))]


def _inputs(
    net: Network,
    w: Weights,
    below: Sequence[Tensor],
    sent: Sequence[Tensor],
    h: Sequence[Tensor],
    push: Tensor | int,
) -> list[Tensor]:
    """What reaches each hidden layer from below, and from above, where each sends to the states h; `push` the last."""
    z = [h[0]]
    for l in range(1, net.L):
        above = push if l == net.L - 1 else net.feedback(l + 1, w[f"W{l + 1}"], sent[l + 1], h[l])
        z.append(below[l] + above)
    return z
