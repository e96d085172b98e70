"""Torch modules as nets, and nets as torch modules.

A module that can be a net is an `nn.Sequential` (others within it are fine) of modules that this package has parts for.
What torch has no module for is a `MapModule` or a `ResidualModule`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nobackprop.core.activations import ACTIVATIONS, SLOPE, Activation
from nobackprop.core.architectures import LINEAR, Part, Residual, assemble, shrink
from nobackprop.core.layers import Conv, Dense, Layer, Tokens
from nobackprop.core.maps import (
    AvgPool,
    Dropout,
    Elementwise,
    Flatten,
    GroupNorm,
    LayerNorm,
    Map,
    MaxPool,
    Mean,
    Shape,
    Shrink,
)
from nobackprop.core.network import Network, Weights
from nobackprop.mistakes import Mistake, at

Product = nn.Linear | nn.Conv2d  # a module that holds W and b of a layer


class MapModule(nn.Module):
    """A map as a torch module, for what torch has no module for: `MapModule(Attention(heads=4))`."""

    def __init__(self, map: Map) -> None:
        super().__init__()
        self.map = map

    def forward(self, h: Tensor) -> Tensor:
        """The map's output for h (N, *in_shape). In training dropout is drawn, from torch's own random numbers."""
        if self.training and isinstance(self.map, Dropout):
            return self.map.masked(torch.randn_like(h))(h)
        return self.map(h)

    def extra_repr(self) -> str:
        return str(self.map)


class ResidualModule(nn.Sequential):
    """Modules in a row whose output is added to their input: `ResidualModule(nn.ReLU(), nn.Linear(9, 9))`.

    Where they change the shape of an image, the input is shrunk (`Shrink`) before it is added.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The sum (N, *out_shape) for an input (N, *in_shape). Raises Mistake where the two can't be added."""
        output = super().forward(input)
        before, after = tuple(input.shape[1:]), tuple(output.shape[1:])
        return output + (input if before == after else shrink(before, after)(input))


# From torch


def from_torch(module: nn.Module, in_shape: Shape) -> tuple[Network, dict[str, Tensor]]:
    """The net that a torch module is, for samples of shape `in_shape`, and copies of its weights, `W1 b1 ... WL bL`.

    The module is an `nn.Sequential` of nn.Linear (on tokens (T, D), for each alone), nn.Conv2d, activations, pooling,
    nn.GroupNorm and nn.LayerNorm without scale and shift, nn.Flatten, nn.Dropout, `MapModule` and `ResidualModule`. It
    ends with nn.Linear, without an activation.

    A run can be of such a module too: `arch=module arch._target_=my.module.make_net`, where `make_net(in_shape,
    outputs)` returns it. The run takes the net alone; its weights start from `init`, as those of all nets do.

    Raises Mistake for what can't be taken, with its place: `module.2.0, Softmax(dim=1): ...`.
    """
    net, products = walked(module, in_shape)
    return net, {name: p.detach().clone() for name, p in held(products).items()}


def walked(module: nn.Module, in_shape: Shape) -> tuple[Network, list[Product]]:
    """Like `from_torch`, but it gives the modules that hold the weights of layers 1..L instead of copies."""
    in_shape = tuple(in_shape)
    walk = _Walk(in_shape)
    row = walk.row(leaves(module))
    if not row or not isinstance(row[-1][1], Dense):
        end = f"the module ends with {row[-1][0]}" if row else "the module is empty"
        raise Mistake(
            f"{end}: it must end with nn.Linear, without an activation, on one row of features a sample (put "
            "nn.Flatten() before it); the loss applies softmax or sigmoid"
        )
    net = assemble(in_shape, [part for _, part in row], where=[where for where, _ in row])
    return net, walk.products


def held(products: Sequence[Product]) -> dict[str, nn.Parameter]:
    """The weights that modules hold, not copies, by name: `W1 b1 ... WL bL`."""
    return {
        f"{'W' if name == 'weight' else 'b'}{l}": p
        for l, product in enumerate(products, 1)
        for name, p in product.named_parameters()
    }


def leaves(module: nn.Module, place: str = "module") -> Iterator[tuple[str, nn.Module]]:
    """The modules in an nn.Sequential and in those within it, in order, each with its place, such as `module.0.2`.

    A module that stands in several places is given for each of them.
    """
    if type(module).forward is nn.Sequential.forward:
        yield from _within(module, place)
    else:
        yield place, module


def _within(modules: nn.Module, place: str) -> Iterator[tuple[str, nn.Module]]:
    assert isinstance(modules, nn.Sequential)
    for number, module in enumerate(modules):
        yield from leaves(module, f"{place}.{number}")


class _Walk:
    """A walk up a torch module. It knows the shape of one sample at its place, and the products that it has passed."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.products: list[Product] = []

    def row(self, found: Iterable[tuple[str, nn.Module]], added_to: bool = False) -> list[tuple[str, Part]]:
        """The parts that modules in a row are, each with the place and the module that it comes from.

        `added_to` says that their output will be added to their input, which they must leave as it is.
        """
        row: list[tuple[str, Part]] = []
        modules = [*found]
        for (place, module), (_, behind) in zip(modules, [*modules[1:], ("", None)], strict=False):
            where = f"{place}, {type(module).__name__ if [*module.children()] else module}"
            if type(module).forward is ResidualModule.forward:
                begin = self.shape
                inner = self.row(_within(module, place), added_to=True)
                with at(where):
                    if self.shape != begin:
                        shrink(begin, self.shape)
                row.append((where, Residual(tuple(part for _, part in inner))))
                continue
            with at(where):
                if added_to and getattr(module, "inplace", False) and all(_hands_on(part) for _, part in row):
                    raise Mistake("it would change what the block's output is added to: leave out inplace=True")
                if type(module) is nn.AdaptiveAvgPool2d and type(behind) is not nn.Flatten:
                    raise Mistake("can't be taken without nn.Flatten() right behind it")
                part = self._part(module)
            if part is None:
                continue
            if isinstance(part, Dense) and row and isinstance(row[-1][1], Flatten):
                row.pop()  # fully connected layers flatten by themselves
            row.append((where, part))
        return row

    def _part(self, module: nn.Module) -> Part | None:
        """The part that a module is, or None for a module that changes nothing."""
        if type(module) not in _PARTS:
            instead = [text for kind, text in _INSTEAD.items() if isinstance(module, kind)]
            raise Mistake(f"can't be taken{instead[0] if instead else f'; allowed are {_ALLOWED} in an nn.Sequential'}")
        part = _PARTS[type(module)](module, self.shape)
        if isinstance(part, Layer | Map):
            shape = part.out_shape(self.shape)
            if isinstance(part, Layer):
                assert isinstance(module, Product)
                self._pass(module, part.weight_shape(self.shape))
            self.shape = shape
        return part

    def _pass(self, product: Product, fits: Shape) -> None:
        if not isinstance(product.weight, nn.Parameter):
            raise Mistake("its weight is computed from others (by pruning or weight norm): make it a parameter first")
        if any(p is q for p in product.parameters() for other in self.products for q in other.parameters()):
            raise Mistake("stands twice in the module, or its weights do; give each layer weights of its own")
        if (given := tuple(product.weight.shape)) != fits:
            raise Mistake(f"has a weight of shape {given}; what comes from below, of shape {self.shape}, needs {fits}")
        self.products.append(product)


def _hands_on(part: Part) -> bool:
    """Whether the output of a part may be its input itself, or lie in the same memory."""
    return isinstance(part, Flatten | Dropout)


def _linear(module: nn.Linear, shape: Shape) -> Layer:
    if len(shape) == 3:
        raise Mistake("put nn.Flatten() before it, since nn.Linear takes the last axis alone")
    return (Dense if len(shape) == 1 else Tokens)(module.out_features, bias=_bias(module))


def _conv(module: nn.Conv2d, shape: Shape) -> Conv:
    if module.padding_mode != "zeros":
        raise Mistake("can't be taken; the padding must be zeros")
    sizes = _square(module, "kernel_size", "stride", "padding", "dilation")
    return Conv(module.out_channels, *sizes, groups=module.groups, bias=_bias(module))


def _bias(module: Product) -> bool | None:
    return None if module.bias is not None else False


def _max_pool(module: nn.MaxPool2d, shape: Shape) -> MaxPool:
    _default(module, dilation=1, ceil_mode=False, return_indices=False)
    size, stride, padding = _square(module, "kernel_size", "stride", "padding")
    return MaxPool(size, None if stride == size else stride, padding)


def _avg_pool(module: nn.AvgPool2d, shape: Shape) -> AvgPool:
    _default(module, ceil_mode=False, count_include_pad=True, divisor_override=None)
    size, stride, padding = _square(module, "kernel_size", "stride", "padding")
    return AvgPool(size, None if stride == size else stride, padding)


def _mean(module: nn.AdaptiveAvgPool2d, shape: Shape) -> Mean:
    if module.output_size not in (1, (1, 1)) or len(shape) != 3:
        raise Mistake("can be taken only as nn.AdaptiveAvgPool2d(1) on images (C, H, W)")
    return Mean()


def _group_norm(module: nn.GroupNorm, shape: Shape) -> GroupNorm:
    if module.affine:
        raise Mistake(_AFFINE.format(f"nn.GroupNorm({module.num_groups}, {module.num_channels}, affine=False)"))
    if shape[0] != module.num_channels:
        raise Mistake(f"normalizes {module.num_channels} channels, and what comes from below has the shape {shape}")
    return GroupNorm(module.num_groups, module.eps)


def _layer_norm(module: nn.LayerNorm, shape: Shape) -> LayerNorm:
    axes = tuple(module.normalized_shape)
    if module.elementwise_affine:
        written = axes[0] if len(axes) == 1 else axes
        raise Mistake(_AFFINE.format(f"nn.LayerNorm({written}, elementwise_affine=False)"))
    if shape[-len(axes) :] != axes:
        raise Mistake(f"normalizes a shape {axes}, and what comes from below has the shape {shape}")
    return LayerNorm(len(axes), module.eps)


_AFFINE = (
    "its scale and shift are weights outside of a product, which no rule here trains: write {}; the layer that follows "
    "can do what they would"
)


def _flatten(module: nn.Flatten, shape: Shape) -> Flatten | None:
    _default(module, start_dim=1, end_dim=-1)
    return None if len(shape) == 1 else Flatten()


def _clip(module: nn.Hardtanh, shape: Shape) -> Activation:
    clipped = {(-1.0, 1.0): "pl", (0.0, 1.0): "hard_sigmoid"}
    if (name := clipped.get((module.min_val, module.max_val))) is None:
        raise Mistake("can't be taken; nn.Hardtanh() clips to -1..1, nn.Hardtanh(0, 1) to 0..1")
    return ACTIVATIONS[name]


def _named(module: nn.Module, shape: Shape) -> Activation:
    _default(module, **_GIVEN.get(type(module), {}))
    return ACTIVATIONS[_NAMED[type(module)]]


def _map(module: MapModule, shape: Shape) -> Map | Activation:
    return module.map.activation if isinstance(module.map, Elementwise) else module.map


def _square(module: nn.Module, *names: str) -> list[int]:
    """Attributes that must be one number for both axes of an image. Raises Mistake where they are not."""
    sizes: list[int] = []
    for name in names:
        given = getattr(module, name)
        pair = (given, given) if isinstance(given, int) else given
        if isinstance(pair, str) or pair[0] != pair[1]:
            raise Mistake(f"can't be taken; {name} must be one number for both axes, got {given!r}")
        sizes.append(pair[0])
    return sizes


def _default(module: nn.Module, **values: Any) -> None:
    """Raises Mistake where an attribute does not have the one value that can be taken."""
    for name, value in values.items():
        if (given := getattr(module, name)) != value:
            raise Mistake(f"can't be taken; {name} must be {value}, got {given!r}")


_NAMED: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Softsign: "softsign",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
}
_GIVEN: dict[type[nn.Module], dict[str, float]] = {nn.LeakyReLU: {"negative_slope": SLOPE}, nn.ELU: {"alpha": 1.0}}
_PARTS: dict[type[nn.Module], Callable[[Any, Shape], Part | None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
    nn.AdaptiveAvgPool2d: _mean,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Flatten: _flatten,
    nn.Dropout: lambda module, shape: Dropout(module.p),
    nn.Identity: lambda module, shape: None,
    nn.Hardtanh: _clip,
    **dict.fromkeys(_NAMED, _named),
    MapModule: _map,
}
_ALLOWED = ", ".join(
    [f"nn.{kind.__name__}" for kind in _PARTS if kind is not MapModule] + ["nobackprop.MapModule and ResidualModule"]
)
_INSTEAD: dict[Any, str] = {
    _BatchNorm: ": it makes the samples of a batch depend on each other, and has a state; use nn.GroupNorm(groups, "
    "channels, affine=False)",
    nn.MultiheadAttention: ": its weights are those of two layers; write them as nn.Linear(D, 3 * D), "
    "nobackprop.MapModule(nobackprop.Attention(heads)), nn.Linear(D, D)",
    nn.Softmax | nn.LogSoftmax: ": the loss applies softmax or sigmoid; within a net there is nobackprop.Attention",
}


# To torch


def to_torch(net: Network, weights: Weights) -> nn.Sequential:
    """The net as a torch module, with copies of its weights `W1 b1 ... WL bL`; a rule's own weights are left out.

    It gives what `net.logits(weights, x)` gives, and `from_torch` is the way back. It is in training mode, as torch's
    modules are at first, so that dropout drops until `.eval()`. Parts that torch has no module for are in it as
    `MapModule` and `ResidualModule`. `torch.export.export` takes it, and with onnxscript so does `torch.onnx.export`.

    Raises Mistake where a weight is missing or has another shape, and for a user's own layer or shortcut that no torch
    module can be.
    """
    rows: list[list[nn.Module]] = [[]]  # of the whole, and of each residual block whose end is not reached yet
    ends: list[int] = []  # the layers at which those blocks end
    for l, layer in enumerate(net.layers, 1):
        shapes = [net.shapes[l - 1]]
        for m in layer.read:
            shapes.append(m.out_shape(shapes[-1]))
        steps = [_of_map(m, shape) for m, shape in zip(layer.read, shapes, strict=False)]
        blocks = _blocks(net, l, shapes)
        for number, modules in enumerate([*steps, _of_layer(net, l, weights)]):
            for end, before in blocks.items():
                if before == number:
                    rows.append([])
                    ends.append(end)
            rows[-1] += modules
        if layer.shortcut:
            if (end := ends.pop()) != l:
                raise Mistake(f"layers {l} and {end}: their shortcuts cross, and there is no torch module for that")
            block = rows.pop()
            rows[-1].append(ResidualModule(*block))
    return nn.Sequential(*rows[0])


def _blocks(net: Network, l: int, shapes: Sequence[Shape]) -> dict[int, int]:
    """How many of the maps that layer l reads through stand before each residual block that begins with layer l.

    The keys are the blocks' last layers, outer blocks first. `shapes` are the shapes between the maps. Raises Mistake
    for a shortcut through other maps than those before the block.
    """
    read, blocks = net.layers[l - 1].read, {}
    for end in range(net.L, l - 1, -1):
        shortcut = net.layers[end - 1].shortcut
        if shortcut is None or end - shortcut.over != l - 1:
            continue
        for number, shape in enumerate(shapes):
            before, left = shortcut.maps[:number], shortcut.maps[number:]
            if before == read[:number] and _at_most_shrinks(left, shape, net.shapes[end]):
                blocks[end] = number
                break
        else:
            raise Mistake(
                f"layer {end}: {shortcut} leads through other maps than those with which layer {l} begins to read, and "
                "there is no torch module for that"
            )
    return blocks


def _at_most_shrinks(maps: Sequence[Map], shape: Shape, to: Shape) -> bool:
    """Whether maps do what `ResidualModule` does by itself to an input of that shape."""
    return not maps or (len(maps) == 1 and isinstance(maps[0], Shrink) and maps[0] == shrink(shape, to))


def _of_layer(net: Network, l: int, weights: Weights) -> list[nn.Module]:
    """The modules of a layer's product and activation."""
    layer, read, (outputs, inputs, *_) = net.layers[l - 1], net.read_shapes[l], net.weight_shape(l)
    if type(layer) is Conv:
        passes = layer.kernel, layer.stride, layer.padding, layer.dilation, layer.groups
        product = nn.Conv2d(read[0], outputs, *passes, device="meta")
    elif type(layer) is Dense or type(layer) is Tokens:
        product = nn.Linear(inputs, outputs, device="meta")
    else:
        raise Mistake(f"layer {l}: there is no torch module for {layer}")
    product.weight = _copied(weights, f"W{l}", net.weight_shape(l))
    product.register_parameter("bias", _copied(weights, f"b{l}", (outputs,)) if net.has_bias(l) else None)
    f = net.activations[l]
    return [
        *([nn.Flatten()] if type(layer) is Dense and len(read) > 1 else []),
        product,
        *([] if l == net.L or f == LINEAR else [_of_activation(f)]),
    ]


def _copied(weights: Weights, name: str, shape: Shape) -> nn.Parameter:
    if name not in weights or tuple(weights[name].shape) != shape:
        given = f"has the shape {tuple(weights[name].shape)}" if name in weights else "is not there"
        raise Mistake(f"among the weights {name} {given}: this net needs one of shape {shape}")
    return nn.Parameter(weights[name].detach().clone())


def _of_activation(f: Activation) -> nn.Module:
    make = _ACTIVATIONS.get(f.name)
    return make() if make and f == ACTIVATIONS[f.name] else MapModule(Elementwise(f))


def _of_map(m: Map, shape: Shape) -> Sequence[nn.Module]:
    """The modules that are a map of inputs of that shape."""
    make = _MAPS.get(type(m))
    return make(m, shape) if make else [MapModule(m)]


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **{name: kind for kind, name in _NAMED.items()},
    "pl": nn.Hardtanh,
    "hard_sigmoid": lambda: nn.Hardtanh(0, 1),
    "identity": nn.Identity,
}
_MAPS: dict[type[Map], Callable[[Any, Shape], Sequence[nn.Module]]] = {
    Elementwise: lambda m, shape: [_of_activation(m.activation)],
    MaxPool: lambda m, shape: [nn.MaxPool2d(m.size, m.stride, m.padding)],
    AvgPool: lambda m, shape: [nn.AvgPool2d(m.size, m.stride, m.padding)],
    Mean: lambda m, shape: [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if len(shape) == 3 else [MapModule(m)],
    GroupNorm: lambda m, shape: [nn.GroupNorm(m.groups, shape[0], m.eps, affine=False)],
    LayerNorm: lambda m, shape: [nn.LayerNorm([*shape[-m.axes :]], m.eps, elementwise_affine=False)],
    Flatten: lambda m, shape: [nn.Flatten()],
    Dropout: lambda m, shape: [nn.Dropout(m.rate)],
}
