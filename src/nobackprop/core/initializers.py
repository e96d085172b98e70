"""How weights start: by name (`init=orthogonal`), or by the mDFA program's strings (`init.forward=U1`).

Every tensor is drawn in float32 on the CPU from a stream of its own, `stream(seed, name)`, so it does not depend on the
device, the rule or the other tensors. The fan-in follows from the tensor's shape. That of a matrix is its second axis,
so that of DFA's B, (units, outputs), is the number of outputs. That of a kernel is input channels times positions.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf, prod
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from nobackprop.core.maps import Shape
from nobackprop.core.network import Network
from nobackprop.core.random import stream
from nobackprop.core.rule import Rule
from nobackprop.mistakes import Mistake

MOST = 2**60  # numbers in a tensor; torch counts its bytes in 63 bits
LARGEST = 1e30  # bound or standard deviation of a draw: torch draws in float32


@dataclass(frozen=True)
class Initializer(ABC):
    """Draws a tensor of a shape. `may_be_absolute` says whether the draw may be replaced by its absolute value."""

    may_be_absolute: ClassVar[bool] = True
    # True for the strings P and A: every draw but the first forward layer's is replaced by its absolute value.
    nonnegative: ClassVar[bool] = False

    @abstractmethod
    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        """A float32 tensor of that shape on the CPU, drawn from the generator."""


@dataclass(frozen=True)
class Zeros(Initializer):
    """All zero."""

    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        return torch.zeros(shape)


@dataclass(frozen=True)
class Uniform(Initializer):
    """Uniform in +- scale * fan_in^power. The power -1/2 is `U` as the mDFA program documents it."""

    scale: float = 1.0
    power: float = -0.5

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise Mistake(f"scale is {self.scale}: it bounds the draw, so 0 or more")

    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        """Raises Mistake where a float32 has no such numbers."""
        fan_in = prod(shape[1:])
        try:
            bound = self.scale * fan_in**self.power
        except OverflowError:
            bound = inf
        if bound > LARGEST:
            raise Mistake(f"init: {self} draws from +-{bound:g} at a fan-in of {fan_in}: a float32 has no such weights")
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class Normal(Initializer):
    """Normal with mean zero and standard deviation `std` (not a variance), whatever the fan-in."""

    std: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.std <= LARGEST:
            raise Mistake(f"std is {self.std}: a standard deviation is 0 or more, here up to {LARGEST}")

    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        return torch.empty(shape).normal_(0, self.std, generator=generator)


class NonnegativeUniform(Uniform):
    """Uniform, whose absolute value `initial_weights` takes, except in the first forward layer."""

    nonnegative = True


class NonnegativeNormal(Normal):
    """Normal, whose absolute value `initial_weights` takes, except in the first forward layer."""

    nonnegative = True


@dataclass(frozen=True)
class _Scaled(Initializer):
    """One of torch's initializers, times `gain`."""

    gain: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.gain <= LARGEST:
            raise Mistake(f"gain is {self.gain}: it multiplies weights drawn for a gain of 1, so 0 to {LARGEST}")


class Orthogonal(_Scaled):
    """Orthonormal rows or columns times `gain` (Saxe et al., 2014)."""

    may_be_absolute = False

    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        return nn.init.orthogonal_(torch.empty(shape), self.gain, generator)


class GlorotUniform(_Scaled):
    """Uniform with variance gain^2 * 2 / (fan_in + fan_out) (Glorot & Bengio, 2010)."""

    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        return nn.init.xavier_uniform_(torch.empty(shape), self.gain, generator)


class GlorotNormal(_Scaled):
    """Normal with variance gain^2 * 2 / (fan_in + fan_out) (Glorot & Bengio, 2010)."""

    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        return nn.init.xavier_normal_(torch.empty(shape), self.gain, generator)


class HeUniform(Initializer):
    """Uniform with variance 2 / fan_in (He et al., 2015)."""

    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        return nn.init.kaiming_uniform_(torch.empty(shape), nonlinearity="relu", generator=generator)


class HeNormal(Initializer):
    """Normal with variance 2 / fan_in (He et al., 2015)."""

    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        return nn.init.kaiming_normal_(torch.empty(shape), nonlinearity="relu", generator=generator)


class LecunNormal(Initializer):
    """Normal with variance 1 / fan_in (LeCun et al., 1998)."""

    def draw(self, shape: Shape, generator: Generator) -> Tensor:
        return nn.init.kaiming_normal_(torch.empty(shape), nonlinearity="linear", generator=generator)


STRINGS = (
    "0 (zeros), U<v> (uniform, +-v/sqrt(fan-in)), N<v> (normal, standard deviation v), P<v> and A<v> (the absolute "
    "values of U<v> and N<v>), literal_U<v> and literal_P<v> (+-v*fan-in^(1/4), as the mDFA program computes U and P)"
)


def from_string(text: str | float) -> Initializer:
    """The initializer that one of the mDFA program's strings names: `0`, `U1`, `N0.1`, `P1`, `A0.1`.

    `U1` means what that program documents, +-1/sqrt(fan-in). Its code takes the root twice and draws from
    +-fan_in^(1/4); `literal_U1` and `literal_P1` do the same. Raises Mistake for another string.
    """
    match = re.fullmatch(r"(literal_)?([UNPA])(\d+\.?\d*(?:e-?\d+)?|\.\d+)", str(text))
    if str(text) in ("0", "0.0"):
        return Zeros()
    if match is None or (match[1] and match[2] in "NA"):
        raise Mistake(f"unknown initializer {text!r}: write one of {STRINGS}")
    literal, letter, value = match[1], match[2], float(match[3])
    if value > LARGEST:
        raise Mistake(f"initializer {text!r}: a float32 has no such weights")
    if letter == "N":
        return Normal(value)
    if letter == "A":
        return NonnegativeNormal(value)
    power = 0.25 if literal else -0.5
    return Uniform(value, power) if letter == "U" else NonnegativeUniform(value, power)


def initial_weights(
    net: Network, rule: Rule, forward: Initializer, backward: Initializer, seed: int
) -> dict[str, Tensor]:
    """All weights that a run of this seed starts from, by name.

    W is drawn by `forward`, the rule's own weights by `backward`, and b is zero. Raises Mistake where the rule needs
    non-negative weights and an initializer's draw may not be replaced by its absolute value, and where its `feedback`
    gives anything but tensors by names of their own.
    """
    absolute = rule.nonnegative(net)

    def draw(initializer: Initializer, name: str, shape: Shape) -> Tensor:
        if prod(shape) >= MOST:
            raise Mistake(f"arch: {name} would have the shape {shape}, more numbers than any memory holds")
        tensor = initializer.draw(shape, stream(seed, name))
        if name not in absolute and (name == "W1" or not initializer.nonnegative):
            return tensor
        if not initializer.may_be_absolute:
            raise Mistake(
                f"rule {type(rule).__name__} needs non-negative weights ({name}), and {initializer} would no longer be "
                "what it says: choose another initializer, such as init=strings init.forward=U1 init.backward=U1"
            )
        return tensor.abs()

    shapes = net.weight_shapes
    w = {name: draw(forward, name, s) if name[0] == "W" else torch.zeros(s) for name, s in shapes.items()}
    own: Any = rule.feedback(net, lambda name, shape: draw(backward, name, shape))
    if wrong := [t for t in own.values() if not isinstance(t, Tensor)] if isinstance(own, dict) else [own]:
        kind = type(wrong[0]).__name__
        raise Mistake(f"rule {type(rule).__name__}: feedback gives a {kind}; a dict of tensors by name is needed")
    if taken := own.keys() & w.keys():
        raise Mistake(
            f"rule {type(rule).__name__}: feedback gives {', '.join(sorted(taken))}, as weights of the net are called: "
            "choose another name, such as B1"
        )
    return w | own
