"""Predictive coding."""

from dataclasses import dataclass

from torch import Tensor

from nobackprop.mistakes import Mistake
from nobackprop.network import Network, Weights
from nobackprop.rule import Batch, Grads, Rule


@dataclass(frozen=True)
class PredictiveCoding(Rule):
    """Predictive coding: the net relaxes between input and target; what is left of each layer's error trains it.

    Whittington & Bogacz, "An approximation of the error backpropagation algorithm in a predictive coding network with
    local Hebbian synaptic plasticity", Neural Computation 2017. Each layer predicts the one above,
    `mu[l] = W[l] f(x[l-1]) + b[l]`, and x[1..L-1], from the forward pass on, descend the energy

        E = sum over hidden l of |x[l] - mu[l]|^2 / 2 + loss(mu[L]) / variance

    for `steps` steps of size `rate` (a factor on the derivative of each sample's own energy), all layers at once; then
    so do W and b, one step. With the derivative of E by mu[l], d[l] = mu[l] - x[l], and at the output that of the loss
    over `variance`:

        x[l] <- x[l] - rate * (f'(x[l]) * W[l+1]^T d[l+1] - d[l]),   dW[l] = d[l] f(x[l-1])^T

    As the variance of the output grows, d times the variance tends to backpropagation's. With `fixed_prediction` mu and
    f' stay those of the forward pass (Millidge, Tschantz & Buckley, "Predictive coding approximates backprop along
    arbitrary computation graphs", Neural Computation 2022): then d times the variance relaxes to backpropagation's
    whatever the variance, and with rate 1 is there after one step a hidden layer.

    Raises Mistake for `steps` below 1, a `rate` that is not above 0 and at most 1, or a `variance` of 0 or less.

    Departs from the paper: the target is not clamped to the output but reaches it through the loss, the same thing for
    `squared_error`; the input is not sent through f; gradients are not multiplied by the variance (its program's are).
    """

    steps: int = 20
    rate: float = 0.1
    variance: float = 1.0
    fixed_prediction: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise Mistake(f"rule.steps is {self.steps}: the net must relax for 1 step or more")
        if not 0 < self.rate <= 1:
            raise Mistake(f"rule.rate is {self.rate}: above 0, and 1 at most, where a lone unit is at rest at once")
        if self.variance <= 0:
            raise Mistake(f"rule.variance is {self.variance}: it divides the output's error, so it must be above 0")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = (list(each) for each in net.forward(w, batch.x))
        x, mu = list(z), list(z)
        d = self._errors(net, batch, mu, x)
        for _ in range(self.steps):
            for l in range(1, net.L):
                predicting = z[l] if self.fixed_prediction else x[l]
                down = net.feedback(l + 1, w[f"W{l + 1}"], d[l + 1], like=x[l]) * net.df(predicting, h[l])
                x[l] = x[l] - self.rate * (down - d[l])  # (N, *shape of layer l)
            if not self.fixed_prediction:
                h[1 : net.L] = [net.activation.f(x[l]) for l in range(1, net.L)]
                mu[2:] = [net.preactivation(l, w, h[l - 1]) for l in range(2, net.L + 1)]
            d = self._errors(net, batch, mu, x)
        return {name: g for l in d for name, g in net.hebbian(l, h[l - 1], d[l]).items()}, z[net.L]

    def _errors(self, net: Network, batch: Batch, mu: list[Tensor], x: list[Tensor]) -> dict[int, Tensor]:
        """d[1] ... d[L]: the derivatives of E by mu."""
        d = {l: mu[l] - x[l] for l in range(1, net.L)}
        return d | {net.L: batch.error(mu[net.L]) / self.variance}
