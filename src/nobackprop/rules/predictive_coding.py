"""Predictive coding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads, Rule
from nobackprop.mistakes import Mistake

Relaxed = tuple[Sequence[Tensor], dict[int, Tensor], Tensor]


@dataclass(frozen=True)
class PredictiveCoding(Rule):
    """Predictive coding: the net relaxes between input and target, and the errors that are left train it.

    Whittington & Bogacz, "An approximation of the error backpropagation algorithm in a predictive coding network with
    local Hebbian synaptic plasticity", Neural Computation 2017. Each layer predicts the one above,
    `mu[l] = W[l] f(x[l-1]) + b[l]`. The states x[1..L-1] start from the forward pass and descend the energy

        E = sum over hidden l of |x[l] - mu[l]|^2 / 2 + loss(mu[L]) / variance

    They take `steps` steps of size `rate`, all layers at once. Each sample descends its own energy. Then W and b take
    one step down the same energy. The error d[l] is the derivative of E by mu[l]. In a hidden layer it is
    `mu[l] - x[l]`, and at the output it is the derivative of the loss over `variance`:

        x[l] <- x[l] - rate * (f'(x[l]) * W[l+1]^T d[l+1] - d[l]),   dW[l] = variance d[l] f(x[l-1])^T

    As the variance of the output grows, this tends to backpropagation. With `fixed_prediction`, mu and f' stay those of
    the forward pass (Millidge, Tschantz & Buckley, "Predictive coding approximates backprop along arbitrary computation
    graphs", Neural Computation 2022). The net then relaxes to backpropagation whatever the variance, and with rate 1 it
    is there after one step for each hidden layer. `form` says what relaxes, and how:

    - `states`: the states relax, as above. d is the small difference of two states, so it is not subtracted. It is
      carried from step to step: each step adds to d what it changes in x and, by the activation's `difference`, in mu.
    - `subtracted`: the states relax, and d is subtracted anew at each step. In float32 this leaves lower layers with
      rounding noise. Gradients lack the factor `variance`, which matters under plain SGD.
    - `errors`: the errors d relax, and x[l] is mu[l] - d[l] in every layer. In each step d[l] goes the share `rate` of
      its way to the derivative of loss(mu[L]) / variance by x[l]. That derivative comes down through the whole net, as
      in backpropagation. The errors come to rest where the states do, in as many steps at any depth (Goemaere,
      Oliviers, Bogacz & Demeester, "Error optimization: overcoming exponential signal decay in deep predictive coding
      networks", arXiv 2505.20137, 2025).

    Where a net normalizes, small states have large derivatives. There the states of `states` and `subtracted` do not
    come to rest, and updates grow to a thousand times the gradient; `errors` or `fixed_prediction` is needed. In a net
    with maps and shortcuts, a layer predicts from what comes through these.

    `scaling="mupc"` multiplies each product by 1 / sqrt(fan-in), and that of the output by 1 / fan-in. It is for
    weights that start with variance 1 (`init=normal init.forward.std=1`). It follows the program of Innocenti, Achour &
    Buckley, "muPC: scaling predictive coding to 100+ layer networks", arXiv 2505.13124 (2025), for nets without
    shortcuts. The paper has one more factor, 1 / sqrt(depth), for nets with a shortcut over each layer. It is left out.

    The default of `rate` is that of the authors' public example (Matlab, one hidden layer), which has a variance of 10
    and 100 steps. The defaults of `variance` and `steps` are ours. None for `steps` means 15 for each hidden layer, and
    20 in all with `errors`. With these, updates at the start of training are at most 5 degrees from the gradient with 2
    hidden layers, and at most 18 with 8. With a variance of 10 it is up to 82 (256 units, U1 or N0.05, tanh or relu).

    Raises Mistake for `steps` below 1, a `rate` that is not above 0 and at most 1, a `variance` of 0 or less, or
    another `form` or `scaling`, or states that would not come to rest.

    Departs from the paper:

    - The output is not clamped to the target. The target acts through the loss, which is the same for `squared_error`.
    - The input is not sent through f.
    """

    family: ClassVar[str] = "energies"

    steps: int | None = None
    rate: float = 0.2
    variance: float = 1000.0
    fixed_prediction: bool = False
    form: Literal["states", "errors", "subtracted"] = field(default="states", metadata={"before": "subtracted"})
    scaling: Literal["none", "mupc"] = field(default="none", metadata={"before": "none"})

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise Mistake(f"rule.steps is {self.steps}: the net must relax for 1 step or more (null: what suits it)")
        if not 0 < self.rate <= 1:
            raise Mistake(f"rule.rate is {self.rate}: above 0, and 1 at most, where a lone unit is at rest at once")
        if self.variance <= 0:
            raise Mistake(f"rule.variance is {self.variance}: it divides the output's error, so it must be above 0")
        if self.form not in ("states", "errors", "subtracted"):
            raise Mistake(f"rule.form is {self.form!r}: write states, errors or subtracted")
        if self.scaling not in ("none", "mupc"):
            raise Mistake(f"rule.scaling is {self.scaling!r}: write none or mupc")

    def check(self, net: Network) -> None:
        super().check(net)
        normalizing = [(l, part) for l, kind, part in net.parts() if kind == "normalization"]
        if normalizing and self.form != "errors" and not self.fixed_prediction:
            l, part = normalizing[0]
            raise Mistake(
                f"rule.form is {self.form!r}, and layer {l} has {part}: where a net normalizes, states do not come to "
                "rest, and updates grow to a thousand times the gradient: use rule.form=errors"
            )

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        w = self._scaled(net, w)
        relax = {"states": self._states, "errors": self._errors, "subtracted": self._subtracted}[self.form]
        h, d, z = relax(net, w, batch)
        g = {name: t for l in d for name, t in net.hebbian(l, h[l - 1], d[l]).items()}
        if self.form != "subtracted":
            g = {name: self.variance * t for name, t in g.items()}
        return self._scaled(net, g), z  # the chain rule

    def logits(self, net: Network, w: Weights, x: Tensor) -> Tensor:
        return net.logits(self._scaled(net, w), x)

    def _scaled(self, net: Network, w: Weights) -> dict[str, Tensor]:
        """Weights, or their gradients, times what multiplies their layer's product."""
        if self.scaling == "none":
            return dict(w)
        fan_in = {l: prod(net.weight_shape(l)[1:]) for l in range(1, net.L + 1)}
        factor = {f"W{l}": n**-0.5 if l < net.L else 1 / n for l, n in fan_in.items()}
        return {name: factor.get(name, 1.0) * t for name, t in w.items()}

    def _rounds(self, default: int) -> range:
        return range(default if self.steps is None else self.steps)

    def _states(self, net: Network, w: Weights, batch: Batch) -> Relaxed:
        z, h = (list(each) for each in net.forward(w, batch.x))
        x, mu = list(z), z[net.L]
        d = {l: torch.zeros_like(z[l]) for l in range(1, net.L)} | {net.L: batch.error(mu) / self.variance}
        for _ in self._rounds(15 * (net.L - 1)):
            moves = {l: self.rate * (d[l] - down) for l, down in self._down(net, w, d, x, h)}
            changes: dict[int, Tensor] = {}  # of h
            for l in range(1, net.L):
                d[l] = d[l] - moves[l]
                if not self.fixed_prediction:
                    x[l] = x[l] + moves[l]  # (N, *shape of layer l)
                    h[l] = net.output(l, x[l], h)
                    changes[l] = net.output_difference(l, x[l], moves[l], h, changes)
                    above = net.preactivation_difference(l + 1, w, h[l], changes[l])
                    if l + 1 < net.L:
                        d[l + 1] = d[l + 1] + above
                    else:
                        mu = mu + above
            d[net.L] = batch.error(mu) / self.variance
        return h, d, z[net.L]

    def _errors(self, net: Network, w: Weights, batch: Batch) -> Relaxed:
        x, h = (list(each) for each in net.forward(w, batch.x))
        z, mu = x[net.L], x[net.L]
        d = {l: torch.zeros_like(x[l]) for l in range(1, net.L)} | {net.L: batch.error(mu) / self.variance}
        for _ in self._rounds(20):
            down = {net.L: d[net.L]}
            for l, error in self._down(net, w, down, x, h):
                down[l] = error
                d[l] = d[l] + self.rate * (error - d[l])
            if not self.fixed_prediction:
                for l in range(1, net.L):
                    x[l] = net.preactivation(l, w, h[l - 1]) - d[l]
                    h[l] = net.output(l, x[l], h)
                d[net.L] = batch.error(net.preactivation(net.L, w, h[net.L - 1])) / self.variance
        return h, d, z

    def _subtracted(self, net: Network, w: Weights, batch: Batch) -> Relaxed:
        z, h = (list(each) for each in net.forward(w, batch.x))
        x, mu = list(z), list(z)

        def errors() -> dict[int, Tensor]:
            d = {l: mu[l] - x[l] for l in range(1, net.L)}
            return d | {net.L: batch.error(mu[net.L]) / self.variance}

        d = errors()
        for _ in self._rounds(15 * (net.L - 1)):
            for l, down in self._down(net, w, d, z if self.fixed_prediction else x, h):
                x[l] = x[l] - self.rate * (down - d[l])
            if not self.fixed_prediction:
                for l in range(1, net.L):
                    h[l] = net.output(l, x[l], h)
                mu[2:] = [net.preactivation(l, w, h[l - 1]) for l in range(2, net.L + 1)]
            d = errors()
        return h, d, z[net.L]

    def _down(
        self, net: Network, w: Weights, d: Mapping[int, Tensor], x: Sequence[Tensor], h: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """From the top, for each hidden layer l what comes down to x[l] from the errors d of the layers above."""
        skipped: dict[int, Tensor] = {}
        for l in range(net.L - 1, 0, -1):
            e = net.feedback(l + 1, w[f"W{l + 1}"], d[l + 1], h[l])
            yield l, net.joined(l, e, h, skipped) * net.df(l, x[l], h[l])
