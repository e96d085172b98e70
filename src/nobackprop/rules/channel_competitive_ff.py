"""Forward-forward by channel-wise competition."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from nobackprop.core import maps
from nobackprop.core.layers import Dense
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Grads, Rule
from nobackprop.rules.forward_forward import normalized


@dataclass(frozen=True)
class ChannelCompetitiveFF(Rule):
    """Channel-wise competitive forward-forward: each layer has channels for each class, and these compete.

    Papachristodoulou, Kyrkou, Timotheou & Theocharides, "Convolutional channel-wise competitive learning for the
    forward-forward algorithm", AAAI 2024 (arXiv 2312.12668), and its program (its loss CwC). A layer hands on its h
    rescaled to a mean square of 1. Its channels are cut into one group for each class, and the goodness `G[l, k]` of
    class k is the mean square of its group in what is handed on, over channels and positions. Hidden layer l descends

        -log of softmax(G[l]) at the sample's class

    so that no negative images are needed, and no error passes from layer to layer. The output layer descends the net's
    loss (the program's softmax predictor). The class with the largest goodness in the last hidden layer is another
    answer, `accuracy_goodness`. tanh suits this badly, since no unit can stand out by more than 1; relu suits it well.

    G is of what the layer above reads, so behind a pool, as in the program. Units of a dense layer are its channels.
    Where the number of classes does not divide them, groups differ by one channel. A layer with fewer channels than
    classes has as many groups as channels, each for several classes (the paper's class grouping).

    Departs from the paper's program: h is rescaled for each sample alone, where the program has batch norm; all layers
    learn at once, where the program's stop one after the other; the output layer has the net's optimizer and softmax
    once, where the program has SGD and applies softmax twice. The program's nets convolve every second layer in
    groups, one for each class; a net can do so here (`groups` of `conv`).
    """

    family: ClassVar[str] = "local losses"
    refuses: ClassVar[Mapping[str, str]] = {
        "normalization": "a layer hands on its activations at one length already, in the place of the paper's norm",
        "shortcut": "a layer would compete by the channels of layers below (the paper has layers in a row)",
        "attention": "the channels for queries, keys and values would compete with each other (the paper has none)",
    }

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        y = batch.one_hot
        below, g = batch.x, {}
        for l, z, h, handed_on in self._hidden(net, w, batch.x):
            G, pull, *_ = torch.func.vjp(partial(self._goodness, net, l), h)
            e = torch.softmax(G, 1) - y @ _members(y.shape[1], G.shape[1], y)  # (N, groups)
            g |= net.hebbian(l, below, pull(e)[0] * net.df(l, z, h))
            below = handed_on
        z = net.preactivation(net.L, w, below)
        return g | net.hebbian(net.L, below, batch.error(z)), z

    def logits(self, net: Network, w: Weights, x: Tensor) -> Tensor:
        for _, _, _, handed_on in self._hidden(net, w, x):
            x = handed_on
        return net.preactivation(net.L, w, x)

    def other_logits(self, net: Network, w: Weights, x: Tensor) -> dict[str, Tensor]:
        if net.L == 1:
            return {}
        *_, (l, _, h, _) = self._hidden(net, w, x)
        G = self._goodness(net, l, h)
        G = G @ _members(max(2, net.units(net.L)), G.shape[1], G).mT  # (N, classes)
        return {"goodness": G if net.units(net.L) > 1 else G[:, 1:] - G[:, :1]}

    def _hidden(self, net: Network, w: Weights, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Of each hidden layer its number, z, h, and h as it is handed on."""
        for l in range(1, net.L):
            z = net.preactivation(l, w, x)
            h = net.f(l, z)
            x = normalized(h)
            yield l, z, h, x

    def _goodness(self, net: Network, l: int, h: Tensor) -> Tensor:
        """The goodness of each group of channels of layer l, (N, groups)."""
        squares = maps.through(net.layers[l].read, normalized(h)).square()
        if squares.ndim > 2:
            squares = maps.Mean()(squares)  # (N, channels)
        channels = squares.shape[1]
        members = _members(channels, min(channels, max(2, net.units(net.L))), h)
        return Dense(members.shape[1]).forward((members / members.sum(0)).mT, None, squares)


def _members(count: int, groups: int, like: Tensor) -> Tensor:
    """Which of `count` things belong to which group, (count, groups): things that follow each other go together."""
    numbers = torch.arange(count, device=like.device)
    return (numbers.unsqueeze(1) * groups // count == numbers[:groups]).to(like.dtype)
