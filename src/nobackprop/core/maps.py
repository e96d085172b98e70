"""Maps: what a net does between its products. They have no weights, and can send an error back through themselves.

| operation | what it gives |
| --- | --- |
| `m(h)` | the output for h (N, *in_shape) |
| `m.pull(h, e)` | the error at h, from the error e at the output: the transposed Jacobian at h, times e |
| `m.difference(h, u)` | m(h) - m(h - u), where possible without subtracting nearly equal numbers |

Torch computes most of them, and `torch.func.vjp` of that one function their `pull`. It works under vmap and compiles.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nobackprop.core.activations import Activation
from nobackprop.mistakes import Mistake

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Map(ABC):
    """A function of each sample alone, without weights. `kind` is the name under which a rule refuses such maps."""

    kind: ClassVar[str] = "rearrangement"
    linear: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, h: Tensor) -> Tensor:
        """The output for h (N, *in_shape)."""

    def out_shape(self, in_shape: Shape) -> Shape:
        """The shape of one sample's output. Raises Mistake where the map does not fit such inputs."""
        return tuple(self(torch.empty(1, *in_shape, device="meta")).shape[1:])

    def pull(self, h: Tensor, e: Tensor) -> Tensor:
        """The error at h, from the error e at the output."""
        return torch.func.vjp(self, h)[1](e)[0]

    def difference(self, h: Tensor, u: Tensor) -> Tensor:
        """m(h) - m(h - u)."""
        return self(u) if self.linear else self(h) - self(h - u)

    def _needs(self, axes: int, in_shape: Shape, what: str) -> None:
        if len(in_shape) != axes:
            raise Mistake(f"{self} needs {what}, got shape {in_shape}")


@dataclass(frozen=True)
class Elementwise(Map):
    """An activation as a map, for nets in which it stands before a product and not behind one."""

    kind: ClassVar[str] = "activation"
    activation: Activation

    def __call__(self, h: Tensor) -> Tensor:
        return self.activation.f(h)

    def pull(self, h: Tensor, e: Tensor) -> Tensor:
        return e * self.activation.df(h, self(h))

    def difference(self, h: Tensor, u: Tensor) -> Tensor:
        return self.activation.difference(h, self(h), u)


@dataclass(frozen=True)
class _Pool(Map):
    """Pooling over windows of `size` x `size` positions, `stride` positions apart; None means `size`."""

    kind: ClassVar[str] = "pooling"
    size: int
    stride: int | None = None
    padding: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or (self.stride is not None and self.stride < 1) or not 0 <= 2 * self.padding <= self.size:
            raise Mistake(f"{self}: size and stride must be 1 or more, padding 0 to half of the size")

    def out_shape(self, in_shape: Shape) -> Shape:
        self._needs(3, in_shape, "images (C, H, W)")
        if min(in_shape[1:]) + 2 * self.padding < self.size:
            raise Mistake(f"{self} does not fit a feature map of {in_shape[1]}x{in_shape[2]}: use a smaller size")
        return super().out_shape(in_shape)


@dataclass(frozen=True)
class MaxPool(_Pool):
    """The largest of each window."""

    def __call__(self, h: Tensor) -> Tensor:
        return F.max_pool2d(h, self.size, self.stride, self.padding)

    def difference(self, h: Tensor, u: Tensor) -> Tensor:
        largest, at = self._largest(h)
        _, other = self._largest(h - u)
        values, changes = h.flatten(2), u.flatten(2)
        moved = values.gather(2, at) - values.gather(2, other)  # exactly 0 where both take the same position
        return (moved + changes.gather(2, other)).view_as(largest)

    def _largest(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the positions in the image of its values, (N, C, positions)."""
        largest, at = F.max_pool2d(h, self.size, self.stride, self.padding, return_indices=True)
        return largest, at.flatten(2)


@dataclass(frozen=True)
class AvgPool(_Pool):
    """The mean of each window; padding counts as zeros."""

    linear: ClassVar[bool] = True

    def __call__(self, h: Tensor) -> Tensor:
        return F.avg_pool2d(h, self.size, self.stride, self.padding)


@dataclass(frozen=True)
class Mean(Map):
    """The mean over all positions of an image (C, H, W), or over all tokens (T, D): one number for each channel."""

    kind: ClassVar[str] = "pooling"
    linear: ClassVar[bool] = True

    def __call__(self, h: Tensor) -> Tensor:
        return h.mean(1) if h.ndim == 3 else h.mean((2, 3))

    def out_shape(self, in_shape: Shape) -> Shape:
        if len(in_shape) not in (2, 3):
            raise Mistake(f"{self} needs images (C, H, W) or tokens (T, D), got shape {in_shape}")
        return super().out_shape(in_shape)

    def pull(self, h: Tensor, e: Tensor) -> Tensor:
        return (e.unsqueeze(1) / h.shape[1] if h.ndim == 3 else e[:, :, None, None] / prod(h.shape[2:])).expand_as(h)


def _check_eps(norm: "GroupNorm | LayerNorm") -> None:
    if norm.eps < 0:
        raise Mistake(f"{norm}: eps is added to a variance, so 0 or more")


@dataclass(frozen=True)
class GroupNorm(Map):
    """Rescales each group of a sample's channels to mean 0 and variance 1. Wu & He, "Group normalization", ECCV 2018.

    It has no scale and shift of its own, since the product that follows can do the same.
    """

    kind: ClassVar[str] = "normalization"
    groups: int
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_eps(self)

    def __call__(self, h: Tensor) -> Tensor:
        return F.group_norm(h, self.groups, eps=self.eps)

    def out_shape(self, in_shape: Shape) -> Shape:
        if len(in_shape) < 2 or self.groups < 1 or in_shape[0] % self.groups:
            raise Mistake(f"{self} needs channels that {self.groups} divides, got shape {in_shape}")
        return in_shape


@dataclass(frozen=True)
class LayerNorm(Map):
    """Rescales a sample's values over the last `axes` axes (1: a token's features) to mean 0 and variance 1.

    Ba, Kiros & Hinton, "Layer normalization", 2016. Like `GroupNorm` it has no scale and shift of its own.
    """

    kind: ClassVar[str] = "normalization"
    axes: int = 1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_eps(self)

    def __call__(self, h: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-self.axes :], eps=self.eps)

    def out_shape(self, in_shape: Shape) -> Shape:
        if not 1 <= self.axes <= len(in_shape):
            raise Mistake(f"{self} normalizes 1 to {len(in_shape)} axes of a shape {in_shape}")
        return in_shape


@dataclass(frozen=True)
class Attention(Map):
    """Softmax attention of each head, from tokens that hold queries, keys and values: (T, 3 D) to (T, D).

    Vaswani et al., "Attention is all you need", NeurIPS 2017, without its weights: the layer below makes queries, keys
    and values, and the layer above mixes the heads. With `causal` a token attends to itself and to those before it.
    """

    kind: ClassVar[str] = "attention"
    heads: int
    causal: bool = False

    def __call__(self, h: Tensor) -> Tensor:
        N, T, _ = h.shape
        q, k, v = h.reshape(N, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # each (N, heads, T, D / heads)
        score = q @ k.mT / q.shape[-1] ** 0.5  # (N, heads, T, T)
        if self.causal:
            score = score.masked_fill(torch.ones(T, T, dtype=torch.bool, device=h.device).triu(1), -torch.inf)
        return (score.softmax(-1) @ v).transpose(1, 2).flatten(2)  # (N, T, D)

    def out_shape(self, in_shape: Shape) -> Shape:
        self._needs(2, in_shape, "tokens (T, 3 D)")
        if self.heads < 1 or in_shape[1] % (3 * self.heads):
            raise Mistake(f"{self} needs tokens of 3 x heads x some features, got {in_shape[1]} features")
        return in_shape[0], in_shape[1] // 3


@dataclass(frozen=True)
class Patches(Map):
    """An image (C, H, W), cut into squares of `size` x `size`, as tokens (T, C size size)."""

    linear: ClassVar[bool] = True
    size: int

    def __call__(self, h: Tensor) -> Tensor:
        N, C, H, W = h.shape
        cut = h.reshape(N, C, H // self.size, self.size, W // self.size, self.size)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(N, -1, C * self.size**2)

    def out_shape(self, in_shape: Shape) -> Shape:
        self._needs(3, in_shape, "images (C, H, W)")
        if self.size < 1 or any(n % self.size for n in in_shape[1:]):
            raise Mistake(f"{self} needs images whose height and width it divides, got {in_shape[1]}x{in_shape[2]}")
        return super().out_shape(in_shape)


@dataclass(frozen=True)
class Positions(Map):
    """Adds to each of the tokens (T, D) a fixed code of its position: sines and cosines with geometric periods.

    Vaswani et al., "Attention is all you need", NeurIPS 2017, section 3.5. Learned positions would be weights outside
    of a product.
    """

    def __call__(self, h: Tensor) -> Tensor:
        T, D = h.shape[1:]
        place = torch.arange(T, dtype=h.dtype, device=h.device).unsqueeze(1)
        rate = 10_000.0 ** (-torch.arange(0, D, 2, dtype=h.dtype, device=h.device) / D)
        return h + torch.stack([(place * rate).sin(), (place * rate).cos()], 2).flatten(1)[:, :D]

    def out_shape(self, in_shape: Shape) -> Shape:
        self._needs(2, in_shape, "tokens (T, D)")
        return in_shape

    def pull(self, h: Tensor, e: Tensor) -> Tensor:
        return e

    def difference(self, h: Tensor, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class Flatten(Map):
    """Puts all values of a sample on one axis. Fully connected layers do so by themselves."""

    linear: ClassVar[bool] = True

    def __call__(self, h: Tensor) -> Tensor:
        return h.flatten(1)

    def pull(self, h: Tensor, e: Tensor) -> Tensor:
        return e.view_as(h)


@dataclass(frozen=True)
class Shrink(Map):
    """Takes every `stride`-th position of an image, and adds channels of zeros until there are `channels`.

    It is option A of He, Zhang, Ren & Sun, "Deep residual learning for image recognition", CVPR 2016, for shortcuts
    without weights where the shape changes.
    """

    linear: ClassVar[bool] = True
    stride: int
    channels: int

    def __call__(self, h: Tensor) -> Tensor:
        seen = h[:, :, :: self.stride, :: self.stride]
        return F.pad(seen, (0, 0, 0, 0, 0, self.channels - h.shape[1]))

    def out_shape(self, in_shape: Shape) -> Shape:
        self._needs(3, in_shape, "images (C, H, W)")
        if self.stride < 1 or self.channels < in_shape[0]:
            raise Mistake(f"{self} needs at most {self.channels} channels and a stride of 1 or more, got {in_shape}")
        return super().out_shape(in_shape)


@dataclass(frozen=True)
class Dropout(Map):
    """Dropout: in training, a random share `rate` of the values is set to zero, and the others are divided by 1 - rate.

    Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 2014. The map itself
    changes nothing. `Network.with_noise` replaces it by a `Mask` for a step of training.
    """

    kind: ClassVar[str] = "dropout"
    linear: ClassVar[bool] = True
    rate: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise Mistake(f"{self}: rate is a share of the values, so from 0 to less than 1")

    def __call__(self, h: Tensor) -> Tensor:
        return h

    def pull(self, h: Tensor, e: Tensor) -> Tensor:
        return e

    def masked(self, noise: Tensor) -> "Mask":
        """The mask that standard normal numbers (N, *in_shape) draw."""
        return Mask((torch.special.ndtr(noise) >= self.rate) / (1 - self.rate))


@dataclass(frozen=True, eq=False)
class Mask(Map):
    """Multiplies the values by factors (N, *in_shape), which `Dropout` drew for one step."""

    linear: ClassVar[bool] = True
    factors: Tensor = field(repr=False)

    def __call__(self, h: Tensor) -> Tensor:
        return h * self.factors.to(h.dtype)

    def pull(self, h: Tensor, e: Tensor) -> Tensor:
        return self(e)

    def out_shape(self, in_shape: Shape) -> Shape:
        return in_shape


MAPS: Mapping[str, type[Map]] = {
    kind.__name__: kind
    for kind in (
        Elementwise,
        MaxPool,
        AvgPool,
        Mean,
        GroupNorm,
        LayerNorm,
        Attention,
        Patches,
        Positions,
        Flatten,
        Shrink,
        Dropout,
    )
}


def through(maps: Sequence[Map], h: Tensor) -> Tensor:
    """The output of maps in a row."""
    for m in maps:
        h = m(h)
    return h


def pulled(maps: Sequence[Map], h: Tensor, e: Tensor) -> Tensor:
    """The error at the input h of maps in a row, from the error e at their output."""
    if not maps:
        return e
    first, *others = maps
    return first.pull(h, pulled(others, first(h), e) if others else e)


def difference(maps: Sequence[Map], h: Tensor, u: Tensor) -> Tensor:
    """What maps in a row make of h, minus what they make of h - u."""
    if not maps:
        return u
    *below, last = maps
    for m in below:
        h, u = m(h), m.difference(h, u)
    return last.difference(h, u)
