"""Nets made of a list of layers and maps, in the order in which an image passes through them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import zip_longest
from typing import Any

from nobackprop.core.activations import ACTIVATIONS, Activation, activation as named
from nobackprop.core.layers import LAYERS, Conv, Dense, Layer, Shortcut, Tokens
from nobackprop.core.maps import (
    MAPS,
    Attention,
    Dropout,
    Elementwise,
    GroupNorm,
    LayerNorm,
    Map,
    MaxPool,
    Mean,
    Patches,
    Positions,
    Shape,
    Shrink,
)
from nobackprop.core.network import Network
from nobackprop.mistakes import Mistake, at, close


@dataclass(frozen=True)
class Residual:
    """Parts whose output is added to their input. Where they change its shape, the input is shrunk (`maps.Shrink`)."""

    parts: tuple["Part", ...]


Part = Layer | Map | Activation | Residual


def assemble(in_shape: Shape, parts: Sequence[Part], *, where: Sequence[str] | None = None) -> Network:
    """The net of parts in a row. The last part is its output layer.

    An activation right behind a layer becomes the layer's own. The layer that follows reads through all other maps. The
    net's own activation, which some rules use at the output, is that of the last layer that has one.

    Raises Mistake for a row that can't be such a net. The message names the part that does not fit; `where` has a name
    for each part.
    """
    built = _Row(tuple(in_shape))
    for number, part in enumerate(parts):
        with at(where[number] if where else f"part {number + 1} of the net, {_named(part)}"):
            built.add(part)
    if not built.layers or built.pending or built.layers[-1].activation is not LINEAR or built.layers[-1].shortcut:
        raise Mistake("a net ends with a layer without an activation: the loss applies softmax or sigmoid")
    *hidden, last = built.layers
    own = (layer.activation for layer in reversed(hidden) if layer.activation not in (None, LINEAR))
    return Network(tuple(in_shape), (*hidden, replace(last, activation=None)), next(own, None) or LINEAR)


LINEAR = ACTIVATIONS["identity"]


class _Row:
    """A net under construction."""

    def __init__(self, in_shape: Shape) -> None:
        self.layers: list[Layer] = []
        self.pending: list[Map] = []  # maps that the next layer will read through
        self.shape = in_shape  # of what the next part gets
        self.block = 0  # how many layers there were where the last residual block began

    def add(self, part: Part) -> None:
        if isinstance(part, Residual):
            self._residual(part)
        elif isinstance(part, Layer):
            layer = replace(part, read=tuple(self.pending), activation=part.activation or LINEAR)
            self.shape = part.out_shape(self.shape)
            self.layers.append(layer)
            self.pending = []
        elif isinstance(part, Activation):
            bare = len(self.layers) > self.block and not self.pending and self.layers[-1].activation is LINEAR
            if bare and not self.layers[-1].shortcut:
                self.layers[-1] = replace(self.layers[-1], activation=part)
            else:
                self.pending.append(Elementwise(part))
        else:
            self.shape = part.out_shape(self.shape)
            self.pending.append(part)

    def _residual(self, part: Residual) -> None:
        begin, read, shape = len(self.layers), tuple(self.pending), self.shape
        self.block = begin  # an activation at its head is the block's, not that of the layer below
        for inner in part.parts:
            self.add(inner)
        if len(self.layers) == begin or self.pending:
            raise Mistake("a residual block ends with a layer, or a layer's activation: what it adds to is that output")
        if self.layers[-1].shortcut:
            raise Mistake("a residual block can't end with another one: its last layer would have two shortcuts")
        maps = read if self.shape == shape else (*read, shrink(shape, self.shape))
        self.layers[-1] = replace(self.layers[-1], shortcut=Shortcut(len(self.layers) - begin, maps))


def shrink(shape: Shape, to: Shape) -> Shrink:
    """The map from images of one shape to images of another. Raises Mistake where none without weights does that."""
    if len(shape) == len(to) == 3 and to[0] >= shape[0]:
        stride = -(-shape[1] // to[1])
        shrunk = Shrink(stride, to[0])
        if shrunk.out_shape(shape) == to:
            return shrunk
    raise Mistake(
        f"a residual block makes {to} of {shape}: what it adds must have the same shape, or be an image with more "
        "channels and every second, third, ... position"
    )


def _named(part: Part) -> str:
    return part.name if isinstance(part, Activation) else "Residual" if isinstance(part, Residual) else str(part)


def row(in_shape: Shape, outputs: int, *, layers: Sequence[Any]) -> Network:
    """A net written as a list, from the image up. A fully connected layer for the outputs is added at its end.

    Each part is a name, or a name with its arguments, by position or by name:

        [{conv: [20, 5]}, tanh, {max_pool: 2}, {residual: [{group_norm: 4}, relu, {conv: {channels: 20, kernel: 3,
        padding: 1}}]}, {dense: 500}, tanh]

    Layers: conv, dense, tokens. Maps: max_pool, avg_pool, mean, group_norm, layer_norm, attention, patches, positions,
    flatten, dropout. Activations: those of `nobackprop.activation`. `residual` takes a list of parts.

    Raises Mistake for an unknown name, and for a part that does not fit the output of the parts before it.
    """
    parts = list(_parts(layers, "arch.layers"))
    where = [place for place, _ in parts]
    return assemble(in_shape, [*(part for _, part in parts), Dense(outputs)], where=[*where, "the output layer"])


_KINDS: Mapping[str, type[Layer] | type[Map]] = {
    "".join("_" * (c.isupper() and i > 0) + c.lower() for i, c in enumerate(name)): kind
    for name, kind in {**LAYERS, **MAPS}.items()
    if kind not in (Elementwise, Shrink)
}


def _parts(written: Any, place: str) -> Iterator[tuple[str, Part]]:
    if not isinstance(written, Sequence) or isinstance(written, str):
        raise Mistake(f"{place} is {written!r}: write a list of parts, such as [{{conv: [20, 5]}}, tanh]")
    for number, item in enumerate(written):
        yield f"{place}[{number}]", _part(item, f"{place}[{number}]")


def _part(item: Any, place: str) -> Part:
    if isinstance(item, str):
        name, given = item, []
    elif isinstance(item, Mapping) and len(item) == 1:
        ((name, given),) = item.items()
    else:
        raise Mistake(f"{place} is {item!r}: write a name, or one name with what it takes, such as {{dense: 500}}")
    if name == "residual":
        return Residual(tuple(part for _, part in _parts(given, f"{place}.residual")))
    if name in ACTIVATIONS and not given:
        return named(name)
    if name not in _KINDS:
        known = [*_KINDS, "residual", *ACTIVATIONS]
        raise Mistake(f"{place} is {name!r}: choose one of {', '.join(known)}{close(str(name), known)}")
    return _made(_KINDS[name], name, given, place)


def _made(kind: type[Layer] | type[Map], name: str, given: Any, place: str) -> Layer | Map:
    """The layer or map of a class with the given values: a list, a mapping, or a single value."""
    own = [f for f in fields(kind) if not f.kw_only] + [f for f in fields(kind) if f.name == "bias"]
    values: dict[Any, Any]
    if isinstance(given, Mapping):
        values = dict(given)
    else:
        listed = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        values = {f.name if f else "": value for f, value in zip_longest(own[: len(listed)], listed)}
    kinds: dict[str, Any] = {f.name: f.type for f in own}
    needed = {f.name for f in own if f.default is MISSING}
    fits = needed <= values.keys() <= kinds.keys() and all(
        isinstance(value, kinds[key] if kinds[key] is not float else (int, float))
        and isinstance(value, bool) <= (key in ("bias", "causal"))
        for key, value in values.items()
    )
    if not fits:
        takes = ", ".join(f"{f.name} ({getattr(f.type, '__name__', f.type)})" for f in own)
        raise Mistake(f"{place}: {name} takes {takes}, and {given!r} is not that")
    with at(place):
        return kind(**values)


def lenet(in_shape: Shape, outputs: int, *, activation: str) -> Network:
    """LeNet-5: three convolutions of 5x5, of which two are pooled, and two fully connected layers.

    LeCun, Bottou, Bengio & Haffner, "Gradient-based learning applied to document recognition", Proceedings of the IEEE
    1998, with max pooling and a linear output, as in public programs such as BioTorch. The paper's images are 32x32.
    Here images of 28x28 get a border of zeros two pixels wide.
    """
    f = named(activation)
    below = [Conv(6, kernel=5, padding=2), f, MaxPool(2), Conv(16, kernel=5), f, MaxPool(2)]
    return assemble(in_shape, [*below, Conv(120, kernel=5), f, Dense(84), f, Dense(outputs)])


def vgg(in_shape: Shape, outputs: int, *, depth: int, width: int, activation: str) -> Network:
    """Convolutions of 3x3 with max pooling between them, then fully connected layers: 8 or 11 layers with weights.

    With 11 layers it is net A of Simonyan & Zisserman, "Very deep convolutional networks for large-scale image
    recognition", ICLR 2015, whose width is 64, with hidden fully connected layers of 4096. With 8 layers it is VGG8B of
    Nøkland & Eidnes, "Training neural networks with local error signals", ICML 2019, whose width is 128. `width` is the
    number of channels of the first layer. Hidden fully connected layers are eight times as wide. Feature maps that are
    too small are not pooled.
    """
    multiples = {8: [1, 2, 0, 2, 4, 0, 4, 0, 4, 0], 11: [1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0]}
    if depth not in multiples:
        raise Mistake(f"arch.depth is {depth}: there are VGG nets of {' and '.join(map(str, multiples))} layers")
    f, size = named(activation), min(in_shape[1:])
    parts: list[Part] = []
    for times in multiples[depth]:
        if times:
            parts += [Conv(times * width, kernel=3, padding=1), f]
        elif size >= 2:
            parts.append(MaxPool(2))
            size //= 2
    return assemble(in_shape, [*parts, *[Dense(8 * width), f] * (1 if depth == 8 else 2), Dense(outputs)])


def resnet(
    in_shape: Shape, outputs: int, *, depth: int, widths: Sequence[int], groups: int, activation: str
) -> Network:
    """A residual net for small images: a convolution, a stage of residual blocks for each width, the mean, the output.

    He, Zhang, Ren & Sun, "Deep residual learning for image recognition", CVPR 2016, section 4.2, with shortcuts without
    weights (option A). It has the form of their "Identity mappings in deep residual networks", ECCV 2016: each
    convolution reads its input through a norm and the activation. `depth` counts the layers with weights. All but two
    of them are divided evenly among the stages, two to a block. Group norm, with `groups` groups, replaces batch norm,
    which would make samples depend on each other.
    """
    if not widths:
        raise Mistake("arch.widths is []: write the width of each stage, one at least")
    blocks, left = divmod(depth - 2, 2 * len(widths))
    if left or blocks < 1:
        raise Mistake(
            f"arch.depth is {depth}: with {len(widths)} stages, 2 layers and {2 * len(widths)} more for each block, as "
            f"{2 + 2 * len(widths)}, {2 + 4 * len(widths)}, {2 + 6 * len(widths)}, ..."
        )
    ready = [GroupNorm(groups), named(activation)]
    parts: list[Part] = [Conv(widths[0], kernel=3, padding=1)]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            first, second = (Conv(width, kernel=3, stride=n, padding=1) for n in (stride, 1))
            parts.append(Residual((*ready, first, *ready, second)))
    return assemble(in_shape, [*parts, *ready, Mean(), Dense(outputs)])


def vit(
    in_shape: Shape,
    outputs: int,
    *,
    patch: int | None,
    width: int,
    depth: int,
    heads: int,
    hidden: int,
    dropout: float,
    activation: str,
    own_feedback: bool = False,
) -> Network:
    """A small vision transformer: patches as tokens of `width` features, `depth` blocks, the mean over tokens.

    Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021. A block has attention with `heads` heads and a
    layer of `hidden` features, each behind a layer norm and with a shortcut. Positions are fixed sines and cosines, and
    the mean over tokens replaces a class token, since learned positions and tokens would be weights outside of a
    product. `patch` is the side of a patch in pixels; None means a quarter of the image's height. With `own_feedback`
    each token has weights of its own for feedback that comes straight from the output.
    """
    if depth < 0:
        raise Mistake(f"arch.depth is {depth}: it counts blocks, so 0 or more")
    drop = [Dropout(dropout)] if dropout else []
    side = max(1, in_shape[1] // 4) if patch is None else patch
    parts: list[Part] = [Patches(side), Tokens(width), Positions()]
    for _ in range(depth):
        mixing = [LayerNorm(), Tokens(3 * width), Attention(heads), *drop, Tokens(width)]
        parts += [Residual(tuple(mixing))]
        parts += [Residual((LayerNorm(), Tokens(hidden), named(activation), *drop, Tokens(width)))]
    return replace(assemble(in_shape, [*parts, LayerNorm(), Mean(), Dense(outputs)]), own_feedback=own_feedback)
