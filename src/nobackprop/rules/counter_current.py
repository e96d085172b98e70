"""Counter-current learning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nobackprop.core import maps
from nobackprop.core.layers import Dense
from nobackprop.core.maps import Map
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw, Grads, Rule
from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class CounterCurrent(Rule):
    """Counter-current learning: a second net leads from the labels down, and each layer learns from its counterpart.

    Kao & Hariharan, "Counter-current learning: a biologically plausible dual network approach for deep learning",
    NeurIPS 2024 (arXiv 2409.19841), and its program for classification. The one-hot label of each class k goes down
    through weights Q of its own,

        c[L] = the label,   c[l-1] = f(Q[l]^T c[l])

    and hidden layer l descends a loss of its own, by which its h and the counterpart's c agree in their class:

        128 scale / units * mean over classes k of (h[l] . c[l](k) - y(k))^2

    with y the sample's one-hot label. It reaches W[l] and b[l] through h[l], and Q[l+1] through c[l]. No error passes
    from layer to layer, in neither net. The output layer descends the net's loss. In a linear net with Q = W all of
    this is backpropagation of the squared error, times 256 scale / (units * classes), and Q takes the steps of W.
    `scale` is twice the program's `loss_scale_C`, which its settings for MLPs have at 0.5.

    A layer is compared as the layer above reads it, so behind a pool the pooled h; c goes down through a pool as the
    program has it, by repeating values. `Q2 ... QL` have the shapes of `W2 ... WL`. With one output unit, the labels
    that go down are -1 and 1. Raises Mistake for a `scale` of 0 or less.

    Departs from the paper's program:

    - No weights lead from c[1] to the input's counterpart. They would learn from the input, and nothing from them.
    - Convolutions have the loss of dense layers, over all channels and positions. In the program they have another,
      of cosines, with terms that push samples apart. c goes down through transposed convolutions. The program repeats
      values and convolves them.
    - There are no gradient clipping and no second optimizer; the program's nets have no biases.
    """

    family: ClassVar[str] = "aligned feedback"
    refuses: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("normalization", "shortcut", "attention", "activation"),
            "a layer's counterpart is one product and one activation, as in the paper, and maps beside have none",
        ),
        "dropout": "labels go down once for each class, and what is dropped differs from sample to sample",
    }

    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise Mistake(f"rule.scale is {self.scale}: it scales the losses of hidden layers, so it must be above 0")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        z, h = net.forward(w, batch.x)
        g = net.hebbian(net.L, h[net.L - 1], batch.error(z[net.L]))
        y, c = _labels(batch)
        head = Dense(len(c))
        for l in range(net.L - 1, 0, -1):
            above = net.layers[l]
            u = above.feedback(w[f"Q{l + 1}"], c, c.new_zeros(len(c), *net.read_shapes[l + 1]))
            below = net.f(l, u)  # (classes, *what layer l + 1 reads)
            r, C = maps.through(above.read, h[l]), below.flatten(1)
            e = 256 * self.scale / C.numel() * (head.forward(C, None, r) - y)  # (N, classes)
            d = maps.pulled(above.read, h[l], head.feedback(C, e, r)) * net.df(l, z[l], h[l])
            own = head.hebbian(r, e)[0].view_as(u) * net.df(l, u, below)
            g |= net.hebbian(l, h[l - 1], d)
            g[f"Q{l + 1}"] = above.hebbian(len(c) * own, c)[0]  # a sum over classes
            c = _spread(above.read, c.new_zeros(len(c), *net.shapes[l]), below)
        return g, z[net.L]

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        return {f"Q{l}": draw(f"Q{l}", net.weight_shape(l)) for l in range(2, net.L + 1)}


def _labels(batch: Batch) -> tuple[Tensor, Tensor]:
    """One-hot labels of the samples (N, classes), and what goes down for each class (classes, outputs)."""
    y = batch.y
    if y.shape[1] > 1:
        return batch.one_hot, torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    return batch.one_hot, torch.tensor([[-1.0], [1.0]], dtype=y.dtype, device=y.device)


def _spread(read: Sequence[Map], like: Tensor, c: Tensor) -> Tensor:
    """c, the counterpart of what is read through those maps, in the shape of `like`, of what they read it from."""
    if not read:
        return c
    first, *others = read
    c = _spread(others, first(like), c)
    if first.kind != "pooling":
        return first.pull(like, c)
    if isinstance(first, maps.Mean):
        return first.pull(like, c) * (like[0].numel() / c[0].numel())
    return F.interpolate(c, size=like.shape[2:])
