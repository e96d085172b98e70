"""The forward-forward algorithm."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nobackprop.layers import Conv, Shape
from nobackprop.mistakes import Mistake
from nobackprop.network import Network, Weights
from nobackprop.rule import Batch, Grads, Rule

TINY = 1e-8  # keeps a layer without any activity from dividing by zero
WAVE = 0.35  # the label's share of an image that goes into a convolution


@dataclass(frozen=True)
class ForwardForward(Rule):
    """Forward-forward: each layer alone learns to be active for an image with its label and silent for a wrong one.

    Hinton, "The forward-forward algorithm: some preliminary investigations", arXiv 2212.13345 (2022), supervised as in
    its section 3.3. The label is written over the image's first pixels, one a class: the right one in a positive image,
    a random wrong one in a negative image. With the goodness G[l] the sum of the squares of h[l], each layer descends

        log(1 + exp(-(G[l] - theta)))  for the positive,  log(1 + exp(G[l] - theta))  for the negative image (eq. 1)

    and hands on h[l] at a length that says nothing of G[l]. The answer of the net to an image is the goodness of all
    layers but the first, summed, with each label in turn; those are the logits, and a pass for each class. With ten
    classes they would be most of a step, so it goes without them, and the run without training loss and accuracy.

    Raises Mistake for a `theta` of 0 or less, and for images with fewer pixels than there are classes.

    Departs from the paper: `theta` is a unit's share, times the units of a layer, so that one suits all widths. The
    net's last layer, with a unit a class, learns as the others do. In a convolutional layer G and the length are over
    all channels and positions. Kernels that pass over an image would hardly meet a label in its corner: below a
    convolution the label is a wave over all pixels, in another direction for each class, and 35 % of the image, much as
    in Scodellaro, Kulkarni, Alves & Schröter, "Training convolutional neural networks with the forward-forward
    algorithm", arXiv 2312.14924 (2023).
    """

    theta: float = 0.3

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise Mistake(f"rule.theta is {self.theta}: no goodness is below 0, so it must be above")

    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        right = batch.y if batch.y.shape[1] > 1 else torch.cat([1 - batch.y, batch.y], 1)  # (N, classes)
        wrong = 1 - right if right.shape[1] == 2 else _other(right, batch.noise["wrong_label"])
        h = torch.cat([_labelled(net, batch.x, right), _labelled(net, batch.x, wrong)])  # (2 N, *in_shape)
        sign = torch.cat([-torch.ones_like(right[:, 0]), torch.ones_like(right[:, 0])])  # (2 N,)
        g = {}
        for l in range(1, net.L + 1):
            z = net.preactivation(l, w, h)
            h, below = net.activation.f(z), h
            dG = sign * torch.sigmoid(sign * (_goodness(h) - self.theta * net.units(l)))
            d = _each(dG, h) * 2 * h * net.df(z, h)  # (2 N, *shape of layer l)
            g |= net.hebbian(l, below, d)
            h = _normalized(h)
        return g, None

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        return {"wrong_label": (samples, classes)} if (classes := _classes(net)) > 2 else {}

    def logits(self, net: Network, w: Weights, x: Tensor) -> Tensor:
        labels = torch.eye(_classes(net), dtype=x.dtype, device=x.device)
        G = torch.stack(
            [_total(net, w, _labelled(net, x, label.expand(len(x), -1))) for label in labels], 1
        )  # (N, classes)
        return G if net.units(net.L) > 1 else G[:, 1:] - G[:, :1]


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


def _labelled(net: Network, x: Tensor, label: Tensor) -> Tensor:
    """Images x (N, *in_shape) with one-hot labels (N, classes) in their first pixels, or as waves over all of them."""
    if isinstance(net.layers[0], Conv):
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


def _normalized(h: Tensor) -> Tensor:
    """Each sample's activations at a mean square of 1."""
    return h / _each(h.flatten(1).square().mean(1).sqrt() + TINY, h)


def _each(values: Tensor, like: Tensor) -> Tensor:
    """Values (N,) of samples, to be broadcast over tensors shaped like `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _total(net: Network, w: Weights, x: Tensor) -> Tensor:
    """The goodness (N,) of all layers but the first, or of the one layer there is."""
    h, G = x, torch.zeros_like(x.flatten(1)[:, 0])
    for l in range(1, net.L + 1):
        h = net.activation.f(net.preactivation(l, w, h))
        if l > 1 or net.L == 1:
            G = G + _goodness(h)
        h = _normalized(h)
    return G
