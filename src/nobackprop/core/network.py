"""Networks: layers in a row. The weights are a plain dict of tensors, which is kept elsewhere.

Layers are numbered 1..L. With `h[0] = x`, layer l makes

    r[l] = read[l](h[l-1]),   z[l] = W[l] r[l] + b[l],   h[l] = f[l](z[l]) + S[l](h[l-k])

Here `read` and `S` are maps without weights, such as pooling, normalization or attention. By default there are none,
and few layers have a shortcut S. The last layer is linear, since the loss applies softmax or sigmoid, so h ends at L-1.
The weights are named `W1 b1 ... WL bL`.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import isqrt, prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nobackprop.core import maps
from nobackprop.core.activations import Activation, activation
from nobackprop.core.layers import Conv, Dense, Layer, Shortcut, like_type
from nobackprop.core.maps import Dropout, Map, Shape
from nobackprop.mistakes import Mistake, Unknown

Weights = Mapping[str, Tensor]
ByLayer = Mapping[int, Tensor] | Sequence[Tensor]


@dataclass(frozen=True)
class Network:
    """Layers in a row over inputs of shape `in_shape`. Raises Mistake where a layer does not fit those below.

    With `recompute`, `forward` keeps some layers' h in memory instead of all z and h, and computes the others again
    when a rule asks for them: the same numbers, for up to one more forward pass.

    Tokens share their weights, and so they share the feedback that comes to them straight from the output. With
    `own_feedback` each token has feedback weights of its own.
    """

    in_shape: Shape
    layers: tuple[Layer, ...]
    activation: Activation
    bias: bool = True
    recompute: bool = False
    own_feedback: bool = False

    def __post_init__(self) -> None:
        _ = self.shapes, self.read_shapes, self.span, self.activations, self.dropouts  # a compiled step can't
        if self.layers[-1].activation or self.layers[-1].shortcut:
            raise Mistake("the last layer is linear: it has no activation and no shortcut")

    @property
    def L(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The shape of one sample's h[0], z[1], ..., z[L]."""
        shapes = [self.in_shape]
        for l, layer in enumerate(self.layers, 1):
            shapes.append(layer.out_shape(_shape(layer.read, shapes[-1])))
            if layer.shortcut:
                if not 1 <= layer.shortcut.over <= l:
                    raise Mistake(f"layer {l}: its shortcut goes over {layer.shortcut.over} layers, so 1 to {l}")
                if (brought := _shape(layer.shortcut.maps, shapes[l - layer.shortcut.over])) != shapes[l]:
                    raise Mistake(f"layer {l}: its shortcut brings the shape {brought}, and is added to {shapes[l]}")
        return tuple(shapes)

    @cached_property
    def read_shapes(self) -> tuple[Shape, ...]:
        """The shape of what each layer reads of one sample, by its number; in_shape for 0."""
        return (self.in_shape, *(_shape(layer.read, self.shapes[l]) for l, layer in enumerate(self.layers)))

    @cached_property
    def span(self) -> int:
        """How many layers a layer's output looks back: 1, or as many as the longest shortcut."""
        return max([1, *(layer.shortcut.over for layer in self.layers if layer.shortcut)])

    @cached_property
    def activations(self) -> tuple[Activation, ...]:
        """The activation function of each layer, by its number, with the net's own at 0 and at L."""
        return (self.activation, *(layer.activation or self.activation for layer in self.layers))

    @property
    def differentiable(self) -> bool:
        """Whether all activations have a derivative."""
        within = [m for layer in self.layers for m in (*layer.read, *(layer.shortcut.maps if layer.shortcut else ()))]
        all_of_them = [*self.activations[:-1]]
        all_of_them += [m.activation for m in within if isinstance(m, maps.Elementwise)]
        return all(f.derivative is not None for f in all_of_them)

    def units(self, l: int) -> int:
        """How many units layer l has, over all channels and positions."""
        return prod(self.shapes[l])

    def weight_shape(self, l: int) -> Shape:
        """The shape of W of layer l, and of everything that stands in for it."""
        return self.layers[l - 1].weight_shape(self.read_shapes[l])

    @property
    def weight_shapes(self) -> dict[str, Shape]:
        """The shapes of all W and b, by name."""
        shapes: dict[str, Shape] = {}
        for l in range(1, self.L + 1):
            shapes[f"W{l}"] = self.weight_shape(l)
            if self.has_bias(l):
                shapes[f"b{l}"] = shapes[f"W{l}"][:1]
        return shapes

    def has_bias(self, l: int) -> bool:
        """Whether layer l has b."""
        own = self.layers[l - 1].bias
        return self.bias if own is None else own

    def parts(self) -> Iterator[tuple[int, str, Map | Shortcut]]:
        """Every map and shortcut, each with the layer's number and its kind."""
        for l, layer in enumerate(self.layers, 1):
            yield from ((l, m.kind, m) for m in layer.read)
            if layer.shortcut:
                yield l, "shortcut", layer.shortcut
                yield from ((l, m.kind, m) for m in layer.shortcut.maps)

    # Going up

    def forward(self, w: Weights, x: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """All pre-activations z[1..L] and activations h[0..L-1] for x (N, *in_shape); z[0] is x too."""
        if self.recompute:
            return _recomputed(self, w, x)
        z, h = [x], [x]
        for l in range(1, self.L + 1):
            z.append(self.preactivation(l, w, h[l - 1]))
            if l < self.L:
                h.append(self.output(l, z[l], h))
        return z, h

    def preactivation(self, l: int, w: Weights, h: Tensor) -> Tensor:
        """The pre-activation z of layer l from the activation h of the layer below."""
        layer = self.layers[l - 1]
        return layer.forward(w[f"W{l}"], w.get(f"b{l}"), maps.through(layer.read, h))

    def f(self, l: int, z: Tensor) -> Tensor:
        """The activation function of layer l."""
        return self.activations[l].f(z)

    def output(self, l: int, z: Tensor, h: ByLayer) -> Tensor:
        """h[l] from z[l]: f(z[l]), plus what a shortcut, if layer l has one, brings from the h of a layer below."""
        out = self.activations[l].f(z)
        if shortcut := self.layers[l - 1].shortcut:
            return out + maps.through(shortcut.maps, h[l - shortcut.over])
        return out

    def logits(self, w: Weights, x: Tensor) -> Tensor:
        """The output z[L], (N, outputs). Nothing else is kept."""
        h = {0: x}
        for l in range(1, self.L):
            h[l] = self.output(l, self.preactivation(l, w, h[l - 1]), h)
            h.pop(l - self.span, None)
        return self.preactivation(self.L, w, h[self.L - 1])

    # Going down

    def df(self, l: int, z: Tensor, h: Tensor) -> Tensor:
        """The derivative of layer l's activation at its z, given its h. Raises Mistake where there is none."""
        f = self.activations[l]
        return f.df(z, f.f(z) if self.layers[l - 1].shortcut else h)

    def feedback(self, l: int, M: Tensor, e: Tensor, h: Tensor) -> Tensor:
        """The error e at z[l], sent down through M (in the shape of W of layer l) to h, what layer l reads: `M^T e`."""
        layer = self.layers[l - 1]
        if not layer.read:
            return layer.feedback(M, e, h)
        return maps.pulled(layer.read, h, layer.feedback(M, e, maps.through(layer.read, h)))

    def head_shape(self, l: int) -> Shape:
        """The shape of weights between hidden layer l and the output: (units that layer l + 1 reads, outputs)."""
        return (prod(self.read_shapes[l + 1]), self.units(self.L))

    def direct_shape(self, l: int) -> Shape:
        """The shape of B for `direct`: (units that layer l + 1 reads, or features where it reads tokens, outputs)."""
        units, outputs = self.head_shape(l)
        read = self.read_shapes[l + 1]
        return (read[-1] if len(read) == 2 and not self.own_feedback else units, outputs)

    def direct(self, l: int, B: Tensor, e: Tensor, h: Tensor) -> Tensor:
        """The output's error e (N, outputs), sent through B to h, the activation of hidden layer l: `B e`.

        B has the `direct_shape` or the `head_shape`. Where the layer above reads h pooled, its units are those of the
        pooled h.
        """
        read = self.layers[l].read
        like = maps.through(read, h)
        if like.ndim == 4 and like.stride(1) == 1:  # channels last in memory: permuting B is cheaper
            _, C, H, W = like.shape
            B = B.view(C, H, W, -1).permute(1, 2, 0, 3).flatten(0, 2)
            sent = like_type(F.linear(e, B), e).view(-1, H, W, C).permute(0, 3, 1, 2)
        else:
            sent = like_type(F.linear(e, B), e)
            alike = like.ndim == 3 and len(B) == like.shape[-1]  # for all tokens
            sent = sent.unsqueeze(1).expand_as(like) if alike else sent.view_as(like)
        return maps.pulled(read, h, sent)

    def direct_hebbian(self, l: int, h: Tensor, e: Tensor) -> Tensor:
        """The gradient of weights straight from h[l] to the output, in the `direct_shape`: a mean over samples."""
        r = maps.through(self.layers[l].read, h)
        if self.direct_shape(l) != self.head_shape(l):  # tokens share it
            r = r.sum(1)
        return Dense(self.units(self.L)).hebbian(r, e)[0].mT

    def joined(self, l: int, e: Tensor, h: ByLayer, skipped: MutableMapping[int, Tensor]) -> Tensor:
        """The whole error at h[l]: e, from layer l + 1, plus the errors that come down shortcuts that begin at h[l].

        `skipped` holds the errors that are on their way down shortcuts, by the layer where the shortcut begins. It is
        empty at the top and is passed from layer to layer.
        """
        if l in skipped:
            e = e + skipped.pop(l)
        if (shortcut := self.layers[l - 1].shortcut) and (begin := l - shortcut.over) > 0:
            sent = maps.pulled(shortcut.maps, h[begin], e)
            skipped[begin] = skipped[begin] + sent if begin in skipped else sent
        return e

    def hebbian(self, l: int, h: Tensor, d: Tensor) -> dict[str, Tensor]:
        """Gradients of W and b of layer l, by name, from the h it reads and the error d at z: means over samples."""
        layer = self.layers[l - 1]
        dW, db = layer.hebbian(maps.through(layer.read, h), d)
        return {f"W{l}": dW, f"b{l}": db} if self.has_bias(l) else {f"W{l}": dW}

    # Differences without the rounding error of subtracting what is nearly equal

    def difference(self, l: int, z: Tensor, h: Tensor, u: Tensor) -> Tensor:
        """f(z) - f(z - u) for layer l's activation, where its output at z is h."""
        f = self.activations[l]
        return f.difference(z, f.f(z) if self.layers[l - 1].shortcut else h, u)

    def output_difference(self, l: int, z: Tensor, u: Tensor, h: ByLayer, changes: Mapping[int, Tensor]) -> Tensor:
        """How much h[l] changes when the z of layer l changes by u and the h of layers below by `changes`."""
        changed = self.difference(l, z, h[l], u)
        if (shortcut := self.layers[l - 1].shortcut) and (begin := l - shortcut.over) in changes:
            return changed + maps.difference(shortcut.maps, h[begin], changes[begin])
        return changed

    def read_difference(self, l: int, h: Tensor, u: Tensor) -> Tensor:
        """What layer l reads of h, the activation of the layer below, minus what it reads of h - u."""
        return maps.difference(self.layers[l - 1].read, h, u)

    def preactivation_difference(self, l: int, w: Weights, h: Tensor, u: Tensor) -> Tensor:
        """The pre-activation of layer l at h, minus that at h - u."""
        return self.layers[l - 1].forward(w[f"W{l}"], None, self.read_difference(l, h, u))

    # Noise

    @cached_property
    def dropouts(self) -> Mapping[str, tuple[int, int]]:
        """Each dropout by the name of its noise: its layer, and its position among the maps of `read`."""
        return {
            f"dropout{l}_{i}": (l, i)
            for l, layer in enumerate(self.layers, 1)
            for i, m in enumerate(layer.read)
            if isinstance(m, Dropout)
        }

    def noise(self, samples: int) -> dict[str, Shape]:
        """The shapes of the standard normal numbers that a step's dropout is drawn from, by name."""
        return {
            name: (samples, *_shape(self.layers[l - 1].read[:i], self.shapes[l - 1]))
            for name, (l, i) in self.dropouts.items()
        }

    def with_noise(self, noise: Mapping[str, Tensor]) -> "Network":
        """The net of one step of training, with its dropout drawn; the net itself where it has no dropout."""
        if not self.dropouts:
            return self
        layers = list(self.layers)
        for name, (l, i) in self.dropouts.items():
            read = layers[l - 1].read
            m = read[i]
            assert isinstance(m, Dropout)
            layers[l - 1] = replace(layers[l - 1], read=(*read[:i], m.masked(noise[name]), *read[i + 1 :]))
        drawn = object.__new__(Network)  # as replace() does, without working out all shapes again in each step
        for name, value in vars(self).items():
            object.__setattr__(drawn, name, value)
        object.__setattr__(drawn, "layers", tuple(layers))
        return drawn

    # Files

    def describe(self) -> dict[str, Any]:
        """The net as plain data, for a file; `from_description` is the way back."""
        return {
            "in_shape": list(self.in_shape),
            "layers": [_described(layer) for layer in self.layers],
            "activation": self.activation.name,
            "bias": self.bias,
            **({"own_feedback": True} if self.own_feedback else {}),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Network":
        """The net that `describe` described.

        Raises Unknown for a layer or a map that is neither of this package nor imported already.
        """
        layers = tuple(_from_description(layer) for layer in description["layers"])
        return cls(
            tuple(description["in_shape"]),
            layers,
            activation(description["activation"]),
            description["bias"],
            own_feedback=description.get("own_feedback", False),
        )


def _shape(read: Sequence[Map], shape: Shape) -> Shape:
    for m in read:
        shape = m.out_shape(shape)
    return shape


def _described(part: Any) -> Any:
    """A layer, a map or a shortcut as plain data: its type, and the fields that differ from their defaults."""
    if isinstance(part, tuple):
        return [_described(each) for each in part]
    if isinstance(part, Activation):
        return part.name
    if not isinstance(part, Layer | Map | Shortcut):
        return part
    own = {f.name: getattr(part, f.name) for f in fields(part)}
    changed = {f.name: _described(own[f.name]) for f in fields(part) if own[f.name] != f.default}
    return changed if isinstance(part, Shortcut) else {"type": _type(type(part)), **changed}


def _type(kind: type) -> str:
    """The name of a part's class, for a class from elsewhere with its module."""
    own = kind.__module__.startswith(f"{__package__}.")
    return kind.__name__ if own else f"{kind.__module__}.{kind.__qualname__}"


def _from_description(description: Mapping[str, Any]) -> Any:
    """A layer, a map or a shortcut from what `_described` made of it."""
    made = dict(description)
    name = made.pop("type")
    kinds = {_type(kind): kind for base in (Layer, Map, Shortcut) for kind in subclasses(base)}
    if name not in kinds:
        raise Unknown(f"a net with {name}, which is not in nobackprop: import it first")
    for field in made.keys() & {"read", "maps"}:
        made[field] = tuple(_from_description(each) for each in made[field])
    if "activation" in made:
        made["activation"] = activation(made["activation"])
    if "shortcut" in made:
        made["shortcut"] = _from_description({"type": "Shortcut", **made["shortcut"]})
    return kinds[name](**made)


def subclasses(base: type) -> Iterator[type]:
    """The class and all that are made from it, as far as they are imported."""
    yield base
    for kind in base.__subclasses__():
        yield from subclasses(kind)


class _Layers(Sequence[Tensor]):
    """One tensor for each layer, by its number, from `get`."""

    def __init__(self, get: Callable[[int], Tensor], size: int) -> None:
        self.get, self.size = get, size

    def __getitem__(self, l: Any) -> Any:
        numbers = range(self.size)[l]  # slices and negative numbers are taken as in a list
        return self.get(numbers) if isinstance(numbers, int) else [self.get(number) for number in numbers]

    def __len__(self) -> int:
        return self.size


def _recomputed(net: Network, w: Weights, x: Tensor) -> tuple[_Layers, _Layers]:
    """z and h as `Network.forward` gives them: the layers in use, and below them one h for each segment of layers.

    Chen, Xu, Zhang & Guestrin, "Training deep nets with sublinear memory cost", 2016. A rule that goes down, as most
    do, has each segment computed once more, and what was above it is freed. Going up again starts from what is left.
    """
    bottoms = _bottoms(net)
    kept = {0: x}  # segment number: the h below its first layer

    def at(l: int) -> int:
        return max(bisect_left(bottoms, l) - 1, 0)  # the segment of layer l

    def segment(number: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        bottom, top = bottoms[number], [*bottoms, net.L][number + 1]
        z, h = ({0: x} if bottom == 0 else {}), {bottom: kept[number]}
        for l in range(bottom + 1, top + 1):
            z[l] = net.preactivation(l, w, h[l - 1])
            if l < net.L:
                h[l] = net.output(l, z[l], h)
        return z, h

    def reach(number: int) -> list[dict[int, Tensor]]:
        for above in [n for n in kept if n > number]:
            del kept[above]
        for below in range(max(kept), number):
            kept[below + 1] = segment(below)[1][bottoms[below + 1]]
        return list(segment(number))

    current = reach(at(net.L))
    logits = current[0][net.L]

    def find(which: int, l: int) -> Tensor:
        if l not in current[which]:
            current.clear()  # before the next segment needs memory
            current.extend(reach(at(l)))
        return current[which][l]

    return _Layers(lambda l: logits if l == net.L else find(0, l), net.L + 1), _Layers(lambda l: find(1, l), net.L)


def _bottoms(net: Network) -> list[int]:
    """The layers below which segments begin: at the distance that saves most, where no shortcut leads past them."""
    passed = {
        l
        for number, layer in enumerate(net.layers, 1)
        if layer.shortcut
        for l in range(number - layer.shortcut.over + 1, number)
    }
    bottoms, length = [0], isqrt(net.L) // 2 + 1
    for l in range(1, net.L):
        if l >= bottoms[-1] + length and l not in passed:
            bottoms.append(l)
    return bottoms


def mlp(in_shape: Shape, outputs: int, *, hidden: Sequence[int], activation: str, bias: bool = True) -> Network:
    """A fully connected net with hidden layers of those widths; `hidden=[]` is a linear classifier."""
    return _network(in_shape, [Dense(units) for units in hidden], outputs, activation, bias)


def allconv(
    in_shape: Shape, outputs: int, *, filters: Sequence[Sequence[int]], activation: str, bias: bool = True
) -> Network:
    """An all-convolutional net without pooling: `(channels, kernel, stride[, padding])` a layer, then a dense layer.

    Source: the nets of Lechner (ICLR 2020), after Springenberg et al., "Striving for simplicity" (2015).
    """
    for conv in filters:
        if not 2 <= len(conv) <= 4:
            raise Mistake(f"arch.filters: {list(conv)} is not [channels, kernel, stride, padding]")
    return _network(in_shape, [Conv(*conv) for conv in filters], outputs, activation, bias)


def _network(in_shape: Shape, hidden: Sequence[Layer], outputs: int, name: str, bias: bool) -> Network:
    return Network(tuple(in_shape), (*hidden, Dense(outputs)), activation(name), bias)
