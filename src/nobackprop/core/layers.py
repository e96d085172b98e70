"""Layers: three local operations each, and all that is known of a layer's shape.

| operation | Dense | Conv |
| --- | --- | --- |
| `forward(W, b, h)` | W h + b | convolution |
| `feedback(M, e, like)` | M^T e | transposed convolution with M, a tensor in the shape of W |
| `hebbian(h, d)` | d h^T, d | correlation of h and d, summed over positions; both are means over the samples |

A learning rule decides which error d reaches a layer and which M stands in for W; the rest is here, once for all rules.

Under torch's autocast the products alone are computed in its shorter type; what comes out is in the type of what went
in. Rules live by small differences, such as LRA-E's h - f(z - beta d), which are zero between numbers of eight bits.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from nobackprop.mistakes import Mistake

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dense:
    """A fully connected layer; W is (units, inputs). An input of more than one axis a sample is flattened."""

    spatial: ClassVar[bool] = False
    units: int

    def __post_init__(self) -> None:
        _positive(self, "units")

    def weight_shape(self, in_shape: Shape) -> Shape:
        """The shape of W for one sample's input."""
        return (self.units, prod(in_shape))

    def out_shape(self, in_shape: Shape) -> Shape:
        """The shape of one sample's z."""
        return (self.units,)

    def forward(self, W: Tensor, b: Tensor | None, h: Tensor) -> Tensor:
        """z from the input h (N, *in_shape)."""
        return like_type(F.linear(h.flatten(1), W, b), W)  # (N, units)

    def feedback(self, M: Tensor, e: Tensor, like: Tensor) -> Tensor:
        """The error e at z, sent down through M, in the shape of W, to an input like `like`."""
        return like_type(e @ M, e).view_as(like)  # (N, *in_shape)

    def hebbian(self, h: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of W and b, means over samples, from the input h and the error d at z, per sample."""
        d = d / len(d)
        return like_type(d.mT @ h.flatten(1), d), d.sum(0)  # (units, inputs), (units,)


@dataclass(frozen=True)
class Conv:
    """A 2-d convolution; W is (channels, input channels, kernel, kernel), images are (N, C, H, W)."""

    spatial: ClassVar[bool] = True  # its kernel passes over positions
    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        _positive(self, "channels", "kernel", "stride")
        if self.padding < 0:
            raise Mistake(f"{self}: padding must be 0 or more")

    def weight_shape(self, in_shape: Shape) -> Shape:
        """The shape of W for one sample's input."""
        return (self.channels, in_shape[0], self.kernel, self.kernel)

    def out_shape(self, in_shape: Shape) -> Shape:
        """The shape of one sample's z.

        Raises Mistake where the kernel is larger than the padded image, or the input is no image.
        """
        if len(in_shape) != 3:
            raise Mistake(f"{self} needs images (C, H, W), got shape {in_shape}: put it before the dense layers")
        height, width = ((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in in_shape[1:])
        if min(height, width) < 1:
            raise Mistake(
                f"{self} does not fit a feature map of {in_shape[1]}x{in_shape[2]}: "
                "use a smaller kernel or stride, more padding, fewer convolutions or larger images"
            )
        return (self.channels, height, width)

    def forward(self, W: Tensor, b: Tensor | None, h: Tensor) -> Tensor:
        """z from the input h (N, *in_shape)."""
        return like_type(F.conv2d(h, W, b, self.stride, self.padding), W)  # (N, channels, H', W')

    def feedback(self, M: Tensor, e: Tensor, like: Tensor) -> Tensor:
        """The error e at z, sent down through M, in the shape of W, to an input like `like`."""
        down = conv2d_input(like.shape, *_autocast(M, e), self.stride, self.padding)  # (N, C, H, W)
        return like_type(down, e)

    def hebbian(self, h: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of W and b, means over samples, from the input h and the error d at z, per sample."""
        short_h, short_d = _autocast(h, d)
        W = short_d.new_empty(1).expand(self.weight_shape(tuple(h.shape[1:])))  # for its shape alone
        stride, padding = [self.stride] * 2, [self.padding] * 2
        _, dW, db = torch.ops.aten.convolution_backward(
            short_d, short_h, W, [self.channels], stride, padding, [1, 1], False, [0, 0], 1, [False, True, True]
        )
        if short_d is not d:
            db = d.sum((0, 2, 3))  # no product
        return like_type(dW, d) / len(d), db / len(d)


Layer = Dense | Conv


def like_type(product: Tensor, like: Tensor) -> Tensor:
    """The product in the type of `like`, from which autocast may have shortened it."""
    return product if product.dtype == like.dtype else product.to(like.dtype)


def _autocast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as autocast gives them to a convolution; of a convolution's derivatives it does not know."""
    device = a.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return a, b
    short = torch.get_autocast_dtype(device)
    return a.to(short), b.to(short)


def _positive(layer: Layer, *fields: str) -> None:
    for field in fields:
        if getattr(layer, field) < 1:
            raise Mistake(f"{layer}: {field} must be 1 or more")
