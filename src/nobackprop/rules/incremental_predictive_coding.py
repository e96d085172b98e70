"""Incremental predictive coding."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads, Phase, Rule
from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class IncrementalPredictiveCoding(Rule):
    """Incremental predictive coding: the weights move at each step of the net's relaxation, and not after it.

    Salvatori, Song, Yordanov, Millidge, Sha, Emde, Xu, Bogacz & Lukasiewicz, "A stable, fast, and fully automatic
    learning algorithm for predictive coding networks", ICLR 2024 (arXiv 2212.00720), its Algorithm 1. The energy is
    predictive coding's, with mu[l] = W[l] f(x[l-1]) + b[l], and with the errors d[l] = mu[l] - x[l], at the output the
    derivative of the loss by mu[L]:

        x[l] <- x[l] - rate * (f'(x[l]) * W[l+1]^T d[l+1] - d[l])   and at the same time   dW[l] = d[l] f(x[l-1])^T

    `steps` times for a mini-batch, each with a step of the optimizer. x begins as the forward pass has it, so that at
    first the output's weights alone move. A layer predicts from what comes through its maps and shortcuts. With a
    `rate` of 0 states stay where they are.

    Raises Mistake for `steps` below 1 and a `rate` outside 0 to 1, or for a net that normalizes, whose states do not
    come to rest (as with predictive coding).

    Departs from the paper: the target acts through the loss, as in `predictive_coding`; the input is not sent through
    f; x starts anew with each mini-batch. PCX, a library by some of its authors, has mu[l] = f(W[l] x[l-1] + b[l]).
    """

    family: ClassVar[str] = "energies"
    refuses: ClassVar[Mapping[str, str]] = {
        "normalization": "small states have large derivatives there, so that states do not come to rest (see "
        "predictive_coding, whose errors form does)",
    }

    steps: int = 5
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise Mistake(f"rule.steps is {self.steps}: the net relaxes for 1 step or more")
        if not 0 <= self.rate <= 1:
            raise Mistake(f"rule.rate is {self.rate}: 0 at least, and 1 at most, where a lone unit is at rest at once")

    def phases(self) -> tuple[Phase, ...]:
        return tuple(partial(self.step, i) for i in range(self.steps))

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        return self.step(0, net, w, batch)

    def step(self, i: int, net: Network, w: Weights, batch: Batch) -> Grads:
        """The i-th step's gradients, and the states x1 ... x(L-1) that it leaves for the next.

        The logits are the forward pass's, before any weight moved.
        """
        hidden, d, skipped = range(1, net.L), {}, {}
        if i == 0:  # all hidden errors are 0
            x, h = net.forward(w, batch.x)
            mu = x[net.L]
        else:
            x, h = [batch.x, *(batch.noise[f"x{l}"] for l in hidden)], [batch.x]
            for l in hidden:
                h.append(net.output(l, x[l], h))
                d[l] = net.preactivation(l, w, h[l - 1]) - x[l]  # (N, *shape of layer l)
            mu = net.preactivation(net.L, w, h[net.L - 1])
        d[net.L] = batch.error(mu)  # (N, outputs)
        given = {name: t for l in d for name, t in net.hebbian(l, h[l - 1], d[l]).items()}
        down = d[net.L]
        for l in reversed(hidden) if i < self.steps - 1 else ():  # the last states are not needed
            e = net.joined(l, net.feedback(l + 1, w[f"W{l + 1}"], down, h[l]), h, skipped)
            down = d.get(l, torch.zeros_like(x[l]))
            given[f"x{l}"] = x[l] - self.rate * (e * net.df(l, x[l], h[l]) - down)
        return (given, batch.noise["logits"]) if i else (given | {"logits": mu}, mu)
