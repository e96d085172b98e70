"""The forward-forward algorithm."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nobackprop.core.layers import Dense
from nobackprop.core.maps import Shape
from nobackprop.core.network import Network, Weights
from nobackprop.core.rule import Batch, Draw, Grads, Rule, each
from nobackprop.mistakes import Mistake

TINY = 1e-8  # keeps a layer without any activity from dividing by zero
WAVE = 0.35  # the label's share of an image that goes into a convolution


@dataclass(frozen=True)
class ForwardForward(Rule):
    """Forward-forward: each layer alone learns to be active for an image with its label and silent for a wrong one.

    Hinton, "The forward-forward algorithm: some preliminary investigations", arXiv 2212.13345 (2022), supervised as in
    its section 3.3. A label is written over the first pixels of an image, one pixel for each class. A positive image
    has its own label, a negative image has a random wrong one. The goodness G[l] of a layer is the sum of the squares
    of h[l]. Each layer descends its own loss (eq. 1):

        log(1 + exp(-(G[l] - theta)))  for the positive,  log(1 + exp(G[l] - theta))  for the negative image

    The layer above reads h[l] rescaled to a mean square of 1, so that it cannot see G[l].

    The net can answer in two ways, and `readout` says which of them is its prediction:

    - `linear`: a softmax over the sum of R[l] h[l], for the image with a neutral label, an equal share of each class.
      The sum is over all hidden layers but the first, and h[l] is rescaled as above. R descends the loss of this
      softmax. No derivative goes below R. The paper's 1.36 % test errors on MNIST are of this answer. The answer by
      goodness is reported beside it, as `accuracy_goodness`.
    - `goodness`: the label with the largest goodness, summed over all layers but the first. This takes one forward pass
      for each class, which would be most of the work of a step. So such runs record no training loss and no training
      accuracy.

    `normalize_input` rescales the labelled image as activations are rescaled. The program does this, too. (The program
    is a public PyTorch version, loeweX/Forward-Forward; the author's own, in Matlab, was not at hand.) `readout_rate`
    is the learning rate of R over that of the layers, which is 10 in the program. Optimizers that rescale gradients,
    such as AdamW, all but undo it.

    Raises Mistake for a `theta` of 0 or less, a `readout_rate` below 0, another `readout`, and for images with fewer
    pixels than there are classes.

    Departs from the paper:

    - The threshold of a layer is `theta` times its number of units, so that one value suits all widths. In the
      program `theta` is 1.
    - The last layer of the net has one unit for each class. It learns as the others do, and counts in the goodness.
    - relu has its own derivative. The program's lets all errors pass.
    - The program draws all units to the same mean activity. Here nothing does.
    - R decays as other weights do, and starts as `init.backward` says. In the program it decays ten times as much and
      starts at 0.
    - In a convolutional layer, G and the rescaling are over all channels and positions.
    - Below a convolution the label is not written into a corner, where few kernels would meet it. It is a wave over all
      pixels that makes up 35 % of the image, and each class has a wave of its own. Scodellaro, Kulkarni, Alves &
      Schröter, "Training convolutional neural networks with the forward-forward algorithm", arXiv 2312.14924 (2023),
      do much the same.
    """

    family: ClassVar[str] = "local losses"

    refuses: ClassVar[Mapping[str, str]] = {
        "normalization": "a layer hands on its activations at one length already, all that the paper normalizes",
        "shortcut": "a layer would see the goodness of layers below, which the paper hides from it (section 2)",
        "dropout": "an image with its right and with a wrong label must differ by the label alone",
        "attention": "the paper's layers are a product and relu each, and learn from what these alone make active",
    }

    theta: float = 0.3
    readout: Literal["linear", "goodness"] = field(default="linear", metadata={"before": "goodness"})
    readout_rate: float = field(default=10.0, metadata={"before": 10.0})
    normalize_input: bool = field(default=True, metadata={"before": False})

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise Mistake(f"rule.theta is {self.theta}: no goodness is below 0, so it must be above")
        if self.readout not in ("linear", "goodness"):
            raise Mistake(f"rule.readout is {self.readout!r}: write linear or goodness")
        if self.readout_rate < 0:
            raise Mistake(f"rule.readout_rate is {self.readout_rate}: it scales the rate of R, so 0 or more")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        right = batch.one_hot
        wrong = 1 - right if right.shape[1] == 2 else _other(right, batch.noise["wrong_label"])
        x = [_labelled(net, batch.x, label) for label in (right, wrong)]
        if self.readout == "linear":
            x.append(_neutral(net, batch.x))
        sign = torch.cat([-torch.ones_like(right[:, 0]), torch.ones_like(right[:, 0])])  # (2 N,)
        n, g, seen = len(sign), {}, {}
        for l, below, z, h, handed_on in self._layers(net, w, torch.cat(x)):
            dG = sign * torch.sigmoid(sign * (_goodness(h[:n]) - self.theta * net.units(l)))
            d = each(dG, h) * 2 * h[:n] * net.df(l, z[:n], h[:n])  # (2 N, *shape of layer l)
            g |= net.hebbian(l, below[:n], d)
            seen[l] = handed_on[n:]
        if self.readout == "goodness":
            return g, None
        logits = self._read(net, w, seen)
        e = batch.error(logits)  # (N, outputs)
        return g | {f"R{l}": _reader(net).hebbian(seen[l], e)[0] for l in _read_layers(net)}, logits

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        return {"wrong_label": (samples, classes)} if (classes := _classes(net)) > 2 else {}

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        layers = _read_layers(net) if self.readout == "linear" else ()
        return {f"R{l}": draw(f"R{l}", (net.units(net.L), net.units(l))) for l in layers}

    def gain(self, name: str) -> float:
        return self.readout_rate if name.startswith("R") else 1.0

    def logits(self, net: Network, w: Weights, x: Tensor) -> Tensor:
        if self.readout == "goodness":
            return self._of_goodness(net, w, x)
        layers = self._layers(net, w, _neutral(net, x))
        return self._read(net, w, {l: handed_on for l, _, _, _, handed_on in layers})

    def other_logits(self, net: Network, w: Weights, x: Tensor) -> dict[str, Tensor]:
        return {"goodness": self._of_goodness(net, w, x)} if self.readout == "linear" else {}

    def stand_ins(self, net: Network, w: Weights, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
        return {}  # R stands in for no W

    def _layers(self, net: Network, w: Weights, x: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """Of each layer its number, its input, z, h, and h as it is handed on."""
        below = normalized(x) if self.normalize_input else x
        for l in range(1, net.L + 1):
            z = net.preactivation(l, w, below)
            h = net.f(l, z)
            handed_on = normalized(h)
            yield l, below, z, h, handed_on
            below = handed_on

    def _read(self, net: Network, w: Weights, seen: dict[int, Tensor]) -> Tensor:
        first, *others = (_reader(net).forward(w[f"R{l}"], None, seen[l]) for l in _read_layers(net))
        return sum(others, first)  # (N, outputs)

    def _of_goodness(self, net: Network, w: Weights, x: Tensor) -> Tensor:
        labels = torch.eye(_classes(net), dtype=x.dtype, device=x.device)
        G = torch.stack(
            [self._total(net, w, _labelled(net, x, label.expand(len(x), -1))) for label in labels], 1
        )  # (N, classes)
        return G if net.units(net.L) > 1 else G[:, 1:] - G[:, :1]

    def _total(self, net: Network, w: Weights, x: Tensor) -> Tensor:
        """The goodness (N,) of all layers but the first, or of the one layer there is."""
        G = torch.zeros_like(x.flatten(1)[:, 0])
        for l, _, _, h, _ in self._layers(net, w, x):
            if l > 1 or net.L == 1:
                G = G + _goodness(h)
        return G


def _reader(net: Network) -> Dense:
    return Dense(net.units(net.L))


def _read_layers(net: Network) -> range:
    """All hidden layers but the first; the one there is where there is one, and without any the output layer."""
    return range(min(2, max(1, net.L - 1)), max(2, net.L))


def _classes(net: Network) -> int:
    """Raises Mistake where an image has fewer pixels."""
    classes = max(2, net.units(net.L))
    if net.units(0) < classes:
        raise Mistake(
            f"forward-forward writes the label over the first pixels, one a class: {classes} classes need as many, "
            f"and images of shape {net.in_shape} have {net.units(0)}"
        )
    return classes


def _other(label: Tensor, numbers: Tensor) -> Tensor:
    """Of all labels but the one-hot `label` (N, classes) that with the largest of the random numbers (N, classes)."""
    others = torch.where(label > 0, -torch.inf, numbers)
    return (others == others.amax(1, keepdim=True)).to(label.dtype)


def _neutral(net: Network, x: Tensor) -> Tensor:
    """Images that have an equal share of each label."""
    classes = _classes(net)
    return _labelled(net, x, x.new_full((classes,), 1 / classes).expand(len(x), -1))


def _labelled(net: Network, x: Tensor, label: Tensor) -> Tensor:
    """Images x (N, *in_shape) with one-hot labels (N, classes) in their first pixels, or as waves over all of them."""
    if net.layers[0].spatial:
        waves = label @ _waves(label.shape[1], x).flatten(1)  # (N, H W)
        return (1 - WAVE) * x + WAVE * waves.view(-1, 1, *x.shape[2:])
    return torch.cat([label, x.flatten(1)[:, label.shape[1] :]], 1).view_as(x)


def _waves(classes: int, like: Tensor) -> Tensor:
    """A wave from 0 to 1 for each class, (classes, H, W): directions over half a turn, 4 and 8 pixels long in turn."""
    label, row, column = (torch.arange(n, dtype=like.dtype, device=like.device) for n in (classes, *like.shape[2:]))
    direction = (torch.pi / classes * label).view(-1, 1, 1)
    way = direction.cos() * column + direction.sin() * row.view(-1, 1)
    return (1 + torch.cos(2 * torch.pi / (4 + 4 * (label % 2)).view(-1, 1, 1) * way)) / 2


def _goodness(h: Tensor) -> Tensor:
    return h.flatten(1).square().sum(1)  # (N,)


def normalized(h: Tensor) -> Tensor:
    """Each sample's activations at a mean square of 1. Where all are 0 they stay so, and so do derivatives."""
    return h / each(h.flatten(1).square().mean(1).clamp_min(TINY**2).sqrt() + TINY, h)
