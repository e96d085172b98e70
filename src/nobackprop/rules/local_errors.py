"""Local error signals."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nobackprop.core import maps
from nobackprop.core.layers import Conv, Dense, Layer
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw, Grads, Rule
from nobackprop.mistakes import Mistake

TINY = 1e-8  # keeps features without any spread from dividing by zero


@dataclass(frozen=True)
class LocalErrors(Rule):
    """Local errors: each hidden layer descends losses of its own, and no error comes from the layers above.

    Nokland & Eidnes, "Training neural networks with local error signals", ICML 2019 (arXiv 1901.06656). `loss` chooses
    what layer l descends:

    - `prediction`: the net's loss of a linear head on h[l], `e[l] = dloss/da at a = C[l]^T h[l]`, so that

          d[l] = (C[l] e[l]) * f'(z[l]),   dC[l] = h[l] e[l]^T

      Alone it is Mono-Forward (Gong, Li & Abdulla, "Mono-Forward", arXiv 2501.09238, 2025).
    - `similarity`: how far the samples' similarities are from those of their labels, `mean over pairs of
      (S(T[l] h[l]) - S(y))^2`, with S the cosines between samples, each around its own mean. T[l] is a dense layer, or
      under a convolution one with 3x3 kernels, whose channels' standard deviations over positions are compared (where
      there is one position, the channels themselves).
    - `both`: (1 - beta) times the first and beta times the second, the paper's best ("predsim").

    The output layer descends the net's loss. A head reads what the layer above reads, so behind a pool the pooled h.
    Similarities are those among the samples of a mini-batch; of several processes each compares its own samples.

    `C1 ... C(L-1)` are (units that are read, outputs), `T1 ... T(L-1)` (units, units) or (channels, channels, 3, 3).
    Raises Mistake for another `loss` or a `beta` outside 0 to 1.

    Departs from the paper's program: no batch norm; heads have no biases, start as `init.backward` says (there at 0),
    and read a convolution's output whole, where the program pools it to a few thousand units.
    """

    family: ClassVar[str] = "local losses"

    loss: Literal["prediction", "similarity", "both"] = "prediction"
    beta: float = 0.99

    def __post_init__(self) -> None:
        if self.loss not in ("prediction", "similarity", "both"):
            raise Mistake(f"rule.loss is {self.loss!r}: write prediction, similarity or both")
        if not 0 <= self.beta <= 1:
            raise Mistake(f"rule.beta is {self.beta}: it is the share of the similarity loss, so 0 to 1")

    @property
    def shares(self) -> dict[str, float]:
        """The weight of each loss: of C's and of T's."""
        return {
            "prediction": {"C": 1.0},
            "similarity": {"T": 1.0},
            "both": {"C": 1 - self.beta, "T": self.beta},
        }[self.loss]

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        h, g = {0: batch.x}, {}
        for l in range(1, net.L):
            z = net.preactivation(l, w, h[l - 1])
            h[l] = net.output(l, z, h)
            errors = []  # of each loss, at h[l]
            for letter, share in self.shares.items():
                local = self._prediction if letter == "C" else self._similarity
                dM, e = local(net, l, w[f"{letter}{l}"], h[l], batch)
                g[f"{letter}{l}"] = share * dM
                errors.append(share * e)
            g |= net.hebbian(l, h[l - 1], sum(errors[1:], errors[0]) * net.df(l, z, h[l]))
            h.pop(l - net.span, None)
        z = net.preactivation(net.L, w, h[net.L - 1])
        return g | net.hebbian(net.L, h[net.L - 1], batch.error(z)), z

    def _prediction(self, net: Network, l: int, C: Tensor, h: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The gradient of C[l], and the error at h."""
        dC, e = of_head(net, l, C, h, batch)
        return dC, net.direct(l, C, e, h)

    def _similarity(self, net: Network, l: int, T: Tensor, h: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The gradient of T[l], and the error at h."""
        layer = _transform(net, l)
        u = layer.forward(T, None, h)
        X = _features(u)  # (N, features)
        y = batch.one_hot
        Y = _features(y)
        # of the mean over N^2 pairs; each sample's own share is N times its derivative
        e = torch.func.vjp(_features, u)[1](4 / len(X) * (X @ X.mT - Y @ Y.mT) @ X)[0]
        return layer.hebbian(h, e)[0], layer.feedback(T, e, h)

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        def shape(letter: str, l: int) -> tuple[int, ...]:
            return net.head_shape(l) if letter == "C" else _transform(net, l).weight_shape(net.shapes[l])

        return {
            f"{letter}{l}": draw(f"{letter}{l}", shape(letter, l)) for letter in self.shares for l in range(1, net.L)
        }

    def stand_ins(self, net: Network, w: Weights, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
        return {}  # C and T stand in for no W


def head(net: Network, l: int, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """What the linear head C of layer l reads of h, and its answer (N, outputs)."""
    r = maps.through(net.layers[l].read, h)
    return r, Dense(net.units(net.L)).forward(C.mT, None, r)


def of_head(net: Network, l: int, C: Tensor, h: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The gradient of that head, and its error (N, outputs)."""
    r, a = head(net, l, C, h)
    e = batch.error(a)
    return Dense(net.units(net.L)).hebbian(r, e)[0].mT, e


def _transform(net: Network, l: int) -> Layer:
    """What h[l] goes through before samples are compared."""
    shape = net.shapes[l]
    return Conv(shape[0], 3, 1, 1) if len(shape) == 3 else Dense(net.units(l))


def _features(u: Tensor) -> Tensor:
    """Of each sample a vector of length 1 around its mean, (N, features), so that products are cosines."""
    v = u.flatten(2).std(2) if u.ndim == 4 and u[0, 0].numel() > 1 else u.flatten(1)
    v = v - v.mean(1, keepdim=True)
    return v / (TINY + v.norm(dim=1, keepdim=True))
