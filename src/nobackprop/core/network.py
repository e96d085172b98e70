"""Networks: layers in a row, one activation between them; the weights are a plain dict of tensors kept elsewhere.

Layers are numbered 1..L. `z[l]` is layer l's pre-activation, `h[l] = f(z[l])` its activation, `h[0] = x`; the last
layer is linear (the loss applies softmax or sigmoid), so h ends at L-1. Weights are named `W1 b1 ... WL bL`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isqrt, prod
from typing import Any, get_args

import torch.nn.functional as F
from torch import Tensor

from nobackprop.core.activations import Activation, activation
from nobackprop.core.layers import Conv, Dense, Layer, Shape, like_type
from nobackprop.mistakes import Mistake

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Network:
    """Layers in a row over inputs of shape `in_shape`. Raises Mistake where a layer does not fit the one below.

    With `recompute`, `forward` keeps some layers' h in memory instead of all z and h, and computes the others again
    when a rule asks for them: the same numbers, for up to one more forward pass.
    """

    in_shape: Shape
    layers: tuple[Layer, ...]
    activation: Activation
    bias: bool = True
    recompute: bool = False

    def __post_init__(self) -> None:
        _ = self.shapes

    @property
    def L(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The shape of one sample's h[0], z[1], ..., z[L]."""
        shapes = [self.in_shape]
        for layer in self.layers:
            shapes.append(layer.out_shape(shapes[-1]))
        return tuple(shapes)

    def units(self, l: int) -> int:
        """How many units layer l has, over all channels and positions."""
        return prod(self.shapes[l])

    def weight_shape(self, l: int) -> Shape:
        """The shape of W of layer l, and of everything that stands in for it."""
        return self.layers[l - 1].weight_shape(self.shapes[l - 1])

    def forward(self, w: Weights, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """All pre-activations z[1..L] and activations h[0..L-1] for x (N, *in_shape); z[0] is x too."""
        if self.recompute:
            return _recomputed(self, w, x)
        z, h = [x], [x]
        for l in range(1, self.L + 1):
            z.append(self.preactivation(l, w, h[l - 1]))
            if l < self.L:
                h.append(self.activation.f(z[l]))
        return z, h

    def preactivation(self, l: int, w: Weights, h: Tensor) -> Tensor:
        """The pre-activation z of layer l from the activation h of the layer below."""
        return self.layers[l - 1].forward(w[f"W{l}"], w.get(f"b{l}"), h)

    def logits(self, w: Weights, x: Tensor) -> Tensor:
        """The output z[L], (N, outputs); keeps nothing else."""
        for l in range(1, self.L):
            x = self.activation.f(self.preactivation(l, w, x))
        return self.preactivation(self.L, w, x)

    def df(self, z: Tensor, h: Tensor) -> Tensor:
        """The activation's derivative at z, where h = f(z). Raises Mistake where there is none."""
        return self.activation.df(z, h)

    def difference(self, z: Tensor, h: Tensor, u: Tensor) -> Tensor:
        """f(z) - f(z - u) where h = f(z), without the rounding error of subtracting what is nearly equal."""
        return self.activation.difference(z, h, u)

    def feedback(self, l: int, M: Tensor, e: Tensor, like: Tensor) -> Tensor:
        """The error e at layer l, sent down through M (in the shape of W of layer l): `M^T e`, like `like`."""
        return self.layers[l - 1].feedback(M, e, like)

    def direct(self, B: Tensor, e: Tensor, like: Tensor) -> Tensor:
        """The output's error e (N, outputs), sent through B (units, outputs) to a hidden layer: `B e`, like `like`."""
        if like.ndim == 4 and like.stride(1) == 1:  # channels last in memory, and so is the result: B is the smaller
            _, C, H, W = like.shape
            B = B.view(C, H, W, -1).permute(1, 2, 0, 3).flatten(0, 2)
            return like_type(F.linear(e, B), e).view(-1, H, W, C).permute(0, 3, 1, 2)
        return like_type(F.linear(e, B), e).view_as(like)

    def hebbian(self, l: int, h: Tensor, d: Tensor) -> dict[str, Tensor]:
        """Gradients of W and b of layer l, by name, from its input h and the error d at its z (means over samples)."""
        dW, db = self.layers[l - 1].hebbian(h, d)
        return {f"W{l}": dW, f"b{l}": db} if self.bias else {f"W{l}": dW}

    def describe(self) -> dict[str, Any]:
        """The net as plain data, for a file; `from_description` is the way back."""
        return {
            "in_shape": list(self.in_shape),
            "layers": [{"type": type(layer).__name__, **asdict(layer)} for layer in self.layers],
            "activation": self.activation.name,
            "bias": self.bias,
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Network":
        """The net that `describe` described. Raises Mistake for a layer type it does not know."""
        types = {kind.__name__: kind for kind in get_args(Layer)}
        layers = []
        for fields in description["layers"]:
            fields = dict(fields)
            if (kind := fields.pop("type")) not in types:
                raise Mistake(f"unknown layer type {kind!r}: choose one of {', '.join(types)}")
            layers.append(types[kind](**fields))
        return cls(
            tuple(description["in_shape"]), tuple(layers), activation(description["activation"]), description["bias"]
        )


class _Layers(Sequence[Tensor]):
    """One tensor a layer, by its number, from `get`."""

    def __init__(self, get: Callable[[int], Tensor], size: int) -> None:
        self.get, self.size = get, size

    def __getitem__(self, l: Any) -> Any:
        numbers = range(self.size)[l]  # as a list does with slices, numbers from the end and those that don't exist
        return self.get(numbers) if isinstance(numbers, int) else [self.get(number) for number in numbers]

    def __len__(self) -> int:
        return self.size


def _recomputed(net: Network, w: Weights, x: Tensor) -> tuple[_Layers, _Layers]:
    """z and h as `Network.forward` gives them: the layers in use, and below them one h for each segment of layers.

    Chen, Xu, Zhang & Guestrin, "Training deep nets with sublinear memory cost", 2016. Going down, as most rules do,
    each segment is computed once more, and what was above is freed; going up again starts from what is left.
    """
    length = isqrt(net.L) // 2 + 1
    kept = {0: x}  # segment number: the h below its first layer

    def segment(number: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        bottom = number * length
        z, h = ({0: x} if bottom == 0 else {}), {bottom: kept[number]}
        for l in range(bottom + 1, min(bottom + length, net.L) + 1):
            z[l] = net.preactivation(l, w, h[l - 1])
            if l < net.L:
                h[l] = net.activation.f(z[l])
        return z, h

    def reach(number: int) -> list[dict[int, Tensor]]:
        for above in [n for n in kept if n > number]:
            del kept[above]
        for below in range(max(kept), number):
            kept[below + 1] = segment(below)[1][(below + 1) * length]
        return list(segment(number))

    current = reach((net.L - 1) // length)
    logits = current[0][net.L]

    def find(which: int, l: int) -> Tensor:
        if l not in current[which]:
            current.clear()  # before the next segment needs memory
            current.extend(reach(max(l - 1, 0) // length))
        return current[which][l]

    return _Layers(lambda l: logits if l == net.L else find(0, l), net.L + 1), _Layers(lambda l: find(1, l), net.L)


def mlp(in_shape: Shape, outputs: int, *, hidden: Sequence[int], activation: str, bias: bool = True) -> Network:
    """A fully connected net with hidden layers of those widths; `hidden=[]` is a linear classifier."""
    return _network(in_shape, [Dense(units) for units in hidden], outputs, activation, bias)


def allconv(
    in_shape: Shape, outputs: int, *, filters: Sequence[Sequence[int]], activation: str, bias: bool = True
) -> Network:
    """An all-convolutional net: `(channels, kernel, stride[, padding])` a layer, no pooling, then one dense layer.

    Source: the nets of Lechner (ICLR 2020), after Springenberg et al., "Striving for simplicity" (2015).
    """
    for conv in filters:
        if not 2 <= len(conv) <= 4:
            raise Mistake(f"arch.filters: {list(conv)} is not [channels, kernel, stride, padding]")
    return _network(in_shape, [Conv(*conv) for conv in filters], outputs, activation, bias)


def _network(in_shape: Shape, hidden: Sequence[Layer], outputs: int, name: str, bias: bool) -> Network:
    return Network(tuple(in_shape), (*hidden, Dense(outputs)), activation(name), bias)
