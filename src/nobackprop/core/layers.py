"""Layers: a product with weights, which has three local operations, and the parts around the product.

| operation | Dense, Tokens | Conv |
| --- | --- | --- |
| `forward(W, b, r)` | W r + b | convolution |
| `feedback(M, e, like)` | M^T e | transposed convolution with M, a tensor in the shape of W |
| `hebbian(r, d)` | d r^T, d | correlation of r and d, summed over positions; both are means over the samples |

A learning rule decides which error d reaches a layer and which M replaces W. The rest is here, once for all rules. r is
what the layer reads: the activation below, through the maps of `read`.

Under torch's autocast only the products are computed in the shorter type. Their results are converted back to the type
of the inputs. Rules depend on small differences, such as LRA-E's h - f(z - beta d), which a shorter type loses.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nobackprop.core.activations import Activation
from nobackprop.core.maps import Map, Shape
from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class Shortcut:
    """A shortcut: it adds, to a layer's activation, the activation of `over` layers below, through `maps`.

    With `over` 1 that is the layer right below. Raises Mistake for dropout among the maps, since it would have to drop
    the same values as the dropout that the layers below read through.
    """

    over: int
    maps: tuple[Map, ...] = ()

    def __post_init__(self) -> None:
        if any(m.kind == "dropout" for m in self.maps):
            raise Mistake("a shortcut can't lead through dropout: put dropout into the residual block, not before it")


@dataclass(frozen=True, kw_only=True)
class Layer(ABC):
    """A product, the maps through which it reads the activation below, and the activation that is applied to its z.

    Where `activation` or `bias` is None, the net's is used. `shortcut` is added to f(z).
    """

    spatial: ClassVar[bool] = False  # W passes over positions
    read: tuple[Map, ...] = field(default=(), repr=False)
    activation: Activation | None = field(default=None, repr=False)
    shortcut: Shortcut | None = field(default=None, repr=False)
    bias: bool | None = field(default=None, repr=False)

    @abstractmethod
    def weight_shape(self, in_shape: Shape) -> Shape:
        """The shape of W for one sample's input."""

    @abstractmethod
    def out_shape(self, in_shape: Shape) -> Shape:
        """The shape of one sample's z. Raises Mistake where the layer does not fit such inputs."""

    @abstractmethod
    def forward(self, W: Tensor, b: Tensor | None, r: Tensor) -> Tensor:
        """z from the input r (N, *in_shape)."""

    @abstractmethod
    def feedback(self, M: Tensor, e: Tensor, like: Tensor) -> Tensor:
        """The error e at z, sent down through M, in the shape of W, to an input like `like`."""

    @abstractmethod
    def hebbian(self, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of W and b, means over samples, from the input r and the error d at z, per sample."""


@dataclass(frozen=True)
class Dense(Layer):
    """A fully connected layer; W is (units, inputs). An input of more than one axis a sample is flattened."""

    units: int

    def __post_init__(self) -> None:
        _positive(self, "units")

    def weight_shape(self, in_shape: Shape) -> Shape:
        return (self.units, prod(in_shape))

    def out_shape(self, in_shape: Shape) -> Shape:
        return (self.units,)

    def forward(self, W: Tensor, b: Tensor | None, r: Tensor) -> Tensor:
        return like_type(F.linear(r.flatten(1), W, b), W)  # (N, units)

    def feedback(self, M: Tensor, e: Tensor, like: Tensor) -> Tensor:
        return like_type(e @ M, e).view_as(like)  # (N, *in_shape)

    def hebbian(self, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        d = d / len(d)
        return like_type((r.flatten(1).mT @ d).mT, d), d.sum(0)  # (units, inputs), (units,)


@dataclass(frozen=True)
class Tokens(Layer):
    """A fully connected layer for each token alone; W is (units, features), tokens are (N, T, features)."""

    spatial: ClassVar[bool] = True
    units: int

    def __post_init__(self) -> None:
        _positive(self, "units")

    def weight_shape(self, in_shape: Shape) -> Shape:
        return (self.units, in_shape[-1])

    def out_shape(self, in_shape: Shape) -> Shape:
        if len(in_shape) != 2:
            raise Mistake(f"{self} needs tokens (T, D), got shape {in_shape}: cut images into them with Patches")
        return (in_shape[0], self.units)

    def forward(self, W: Tensor, b: Tensor | None, r: Tensor) -> Tensor:
        return like_type(F.linear(r, W, b), W)  # (N, T, units)

    def feedback(self, M: Tensor, e: Tensor, like: Tensor) -> Tensor:
        return like_type(e @ M, e)  # (N, T, features)

    def hebbian(self, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        d = d / len(d)
        return like_type(d.flatten(0, 1).mT @ r.flatten(0, 1), d), d.sum((0, 1))  # (units, features), (units,)


@dataclass(frozen=True)
class Conv(Layer):
    """A 2-d convolution; W is (channels, input channels / groups, kernel, kernel), images are (N, C, H, W)."""

    spatial: ClassVar[bool] = True
    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    def __post_init__(self) -> None:
        _positive(self, "channels", "kernel", "stride", "dilation", "groups")
        if self.padding < 0:
            raise Mistake(f"{self}: padding must be 0 or more")

    def weight_shape(self, in_shape: Shape) -> Shape:
        return (self.channels, in_shape[0] // self.groups, self.kernel, self.kernel)

    def out_shape(self, in_shape: Shape) -> Shape:
        if len(in_shape) != 3:
            raise Mistake(f"{self} needs images (C, H, W), got shape {in_shape}: put it before the dense layers")
        if in_shape[0] % self.groups or self.channels % self.groups:
            raise Mistake(f"{self}: {self.groups} groups must divide its channels and the {in_shape[0]} that come in")
        reach = self.dilation * (self.kernel - 1) + 1
        height, width = ((n + 2 * self.padding - reach) // self.stride + 1 for n in in_shape[1:])
        if min(height, width) < 1:
            raise Mistake(
                f"{self} does not fit a feature map of {in_shape[1]}x{in_shape[2]}: "
                "use a smaller kernel or stride, more padding, fewer convolutions or larger images"
            )
        return (self.channels, height, width)

    def forward(self, W: Tensor, b: Tensor | None, r: Tensor) -> Tensor:
        z = F.conv2d(r, W, b, self.stride, self.padding, self.dilation, self.groups)  # (N, channels, H', W')
        return like_type(z, W)

    def feedback(self, M: Tensor, e: Tensor, like: Tensor) -> Tensor:
        short_M, short_e = _autocast(M, e)
        sent, _, _ = self._derivatives(short_e, like.to(short_e.dtype), short_M, [True, False, False])
        return like_type(sent, e)  # (N, C, H, W)

    def hebbian(self, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        short_r, short_d = _autocast(r, d)
        W = short_d.new_empty(self.weight_shape(tuple(r.shape[1:])))  # for its shape alone
        _, dW, db = self._derivatives(short_d, short_r, W, [False, True, True])
        if short_d is not d:
            db = d.sum((0, 2, 3))  # no product
        return like_type(dW, d) / len(d), db / len(d)

    def _derivatives(self, d: Tensor, r: Tensor, W: Tensor, asked: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the sum over d * z by the input r, by W and by b, of which `asked` are computed.

        torch.nn.grad's functions have torch fill a tensor in the place of what is not read.
        """
        stride, padding, dilation = ([n] * 2 for n in (self.stride, self.padding, self.dilation))
        of_b, transposed, more = [self.channels], False, [0, 0]
        return torch.ops.aten.convolution_backward(
            d, r, W, of_b, stride, padding, dilation, transposed, more, self.groups, asked
        )


LAYERS: Mapping[str, type[Layer]] = {kind.__name__: kind for kind in (Dense, Conv, Tokens)}


def like_type(product: Tensor, like: Tensor) -> Tensor:
    """The product in the type of `like`, from which autocast may have shortened it."""
    return product if product.dtype == like.dtype else product.to(like.dtype)


def _autocast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors as autocast gives them to a convolution. Autocast leaves a convolution's derivatives out."""
    device = a.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return a, b
    short = torch.get_autocast_dtype(device)
    return a.to(short), b.to(short)


def _positive(layer: Layer, *fields: str) -> None:
    for name in fields:
        if getattr(layer, name) < 1:
            raise Mistake(f"{layer}: {name} must be 1 or more")
