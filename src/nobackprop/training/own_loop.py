"""A learning rule in a training loop of one's own: it fills `.grad` of a torch module's parameters."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nobackprop.core.activations import activation
from nobackprop.core.initializers import Initializer, Uniform, Zeros, initial_weights
from nobackprop.core.layers import Conv, Dense, Layer
from nobackprop.core.losses import Loss
from nobackprop.core.maps import Shape
from nobackprop.core.network import Network
from nobackprop.core.random import normal
from nobackprop.core.rule import Batch, Rule
from nobackprop.core.updates import UPDATES
from nobackprop.mistakes import Mistake, close

ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.Hardtanh: "pl",
    nn.Sigmoid: "sigmoid",
    nn.Softsign: "softsign",
    nn.ReLU6: "relu6",
    nn.Identity: "identity",
}
TAKEN = f"nn.Linear, nn.Conv2d, nn.Flatten and nn.{', nn.'.join(kind.__name__ for kind in ACTIVATIONS)}"


class Gradients(nn.Module):
    """`step(x, y)` fills `.grad` of all weights by a learning rule, where `loss.backward()` would by autograd.

    `step.parameters()` are those of `step.module` and the rule's own weights (`step.feedback`: `B1`, `E2`, ...), for
    one optimizer to take together. `.grad` is None for those that the rule leaves alone. `step.state_dict()` holds
    both, and how many steps there were, of which noise is a function. Made by `gradients`.
    """

    def __init__(
        self,
        module: nn.Module,
        net: Network,
        rule: Rule,
        loss: Loss,
        layers: Sequence[nn.Module],
        feedback: Initializer,
        seed: int,
        update: str,
    ) -> None:
        super().__init__()
        self.module, self.net, self.rule, self.loss = module, net, rule, loss
        self.layers, self.seed, self.update, self.steps = layers, seed, UPDATES[update], 0
        self.feedback = nn.ParameterDict()
        names = self.weights()
        for name, t in initial_weights(net, rule, Zeros(), feedback, seed).items():
            if name not in names:
                self.feedback[name] = nn.Parameter(t.to(names["W1"]), requires_grad=False)
        with torch.no_grad():
            for name in rule.nonnegative(net) & names.keys():
                names[name].abs_()

    def weights(self) -> dict[str, nn.Parameter]:
        """All weights, not copies, by the names that rules use: `W1 b1 ... WL bL`, then the rule's own."""
        names = {"W": "weight", "b": "bias"} if self.net.bias else {"W": "weight"}
        of_module = {
            f"{letter}{l}": getattr(layer, name)
            for l, layer in enumerate(self.layers, 1)
            for letter, name in names.items()
        }
        return of_module | dict(self.feedback)

    @torch.no_grad()
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Fills `.grad` from inputs x (N, ...) and labels y (N,) or targets (N, outputs); gives logits (N, outputs).

        Gradients of before are replaced, so that no `zero_grad` is needed. They are those of the mean over the
        mini-batch, changed as `update` says. Raises Mistake where x or y do not have the shape that is needed.
        """
        x = self._inputs(x)
        if tuple(y.shape) not in {(len(x),), (len(x), self.loss.outputs)} or y.is_floating_point() == (y.ndim == 1):
            raise Mistake(
                f"y has the shape {tuple(y.shape)} and type {y.dtype} for {len(x)} samples: give whole numbers of "
                f"classes ({len(x)},), or targets ({len(x)}, {self.loss.outputs}) in floats"
            )
        self.constrain()
        w = self.weights()
        targets = y.to(x) if y.is_floating_point() else self.loss.target(y.long(), x.dtype)
        shapes = self.rule.noise(self.net, len(x)) | self.net.noise(len(x))
        drawn = normal(shapes, self.seed, "noise", self.steps)
        batch = Batch(x, targets, self.loss, {name: t.to(x) for name, t in drawn.items()})
        grads, logits = self.rule.all_grads(self.net.with_noise(batch.noise), w, batch)
        for name, p in w.items():
            p.grad = None
            if name in grads:
                g = self.update(grads[name].to(p.dtype).contiguous().unsqueeze(0), len(x))[0]
                p.grad = g if (gain := self.rule.gain(name)) == 1 else g * gain
        self.steps += 1
        return logits

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """What the rule makes the net say of x (N, ...): (N, outputs).

        It is what the module says, but for rules that predict in their own way. Raises Mistake for another shape of x.
        """
        x = self._inputs(x)
        self.constrain()
        return self.rule.logits(self.net, self.weights(), x)

    @torch.no_grad()
    def constrain(self) -> None:
        """Puts weights back into the bounds that the rule sets (mDFA), in place.

        `step` and `logits` begin with it. Call it after the optimizer's last step before the module is used by itself.
        """
        w = self.weights()
        for name, projected in self.rule.constrain(self.net, w).items():
            w[name].copy_(projected)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Any) -> None:
        self.steps = int(state)

    def _inputs(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or tuple(x.shape[1:]) not in {self.net.in_shape, (self.net.units(0),)}:
            shape = ", ".join(map(str, self.net.in_shape))
            raise Mistake(f"x has the shape {tuple(x.shape)}: this net takes (N, {shape})")
        return x.reshape(-1, *self.net.in_shape)


def gradients(
    module: nn.Module,
    rule: Rule,
    loss: Loss,
    *,
    in_shape: Shape | None = None,
    feedback: Initializer | None = None,
    update: str = "mean",
    seed: int = 0,
) -> Gradients:
    """A learning rule for a torch module, in a training loop of your own.

        step = nobackprop.gradients(module, nobackprop.DFA(), nobackprop.SoftmaxCrossEntropy(10))
        optimizer = torch.optim.Adam(step.parameters(), lr=1e-3)
        for x, y in loader:
            step(x, y)  # fills .grad
            optimizer.step()

    The module is an `nn.Sequential` (others within it are fine) of nn.Linear and nn.Conv2d, one kind of activation
    after each of them but the last, and nn.Flatten; it ends with nn.Linear. Its weights stay where they are and start
    as they are; where the rule needs non-negative ones (mDFA), as their absolute values.

    `in_shape` is the shape of one input, (C, H, W); it must be given where the module begins with a convolution. The
    rule's own weights are drawn by `feedback` (by default uniform in +-1/sqrt(fan-in)) from `seed`, and so is noise.
    `update` is how a batch becomes one update: mean, sum, unit_norm or unit_norm_relative. Move `step`, not the module,
    to a device. A rule of several phases (weight mirrors) takes all of them from the same weights, where
    `nobackprop.train` lets the optimizer step between them.

    Raises Mistake for a module with anything else in it, and says where; and for a loss of another number of outputs.
    """
    layers, name, places = _layers(module)
    if in_shape is None:
        if isinstance(places[0], nn.Conv2d):
            raise Mistake("the module begins with a convolution: say what it will see, as in in_shape=(3, 32, 32)")
        in_shape = (places[0].in_features,)
    biases = [place.bias is not None for place in places]
    if len({*biases}) > 1:
        raise Mistake(
            f"layers {[l for l, bias in enumerate(biases, 1) if not bias]} have no bias: give all one, or none"
        )
    if update not in UPDATES:
        raise Mistake(f"unknown update {update!r}: choose one of {', '.join(UPDATES)}{close(update, UPDATES)}")
    net = Network(tuple(in_shape), tuple(layers), activation(name), bias=biases[0])
    for l, place in enumerate(places, 1):
        if tuple(place.weight.shape) != (fits := net.weight_shape(l)):
            raise Mistake(
                f"layer {l}, {place}, has a weight of shape {tuple(place.weight.shape)}; what comes from below, of "
                f"shape {net.shapes[l - 1]}, needs {fits}"
            )
    if loss.outputs != net.units(net.L):
        raise Mistake(f"the module has {net.units(net.L)} outputs, and {loss} needs {loss.outputs}")
    return Gradients(module, net, rule, loss, places, feedback or Uniform(), seed, update)


def _parts(module: nn.Module, place: str) -> Iterator[tuple[str, nn.Module]]:
    """What a module holds, in order, and where: `module.0.2`. One that stands in several places comes for each."""
    if type(module) is not nn.Sequential:
        yield place, module
        return
    for number, part in enumerate(module):
        yield from _parts(part, f"{place}.{number}")


def _layers(module: nn.Module) -> tuple[list[Layer], str, list[nn.Linear | nn.Conv2d]]:
    """The layers of a module, the name of its activation, and the torch modules that hold W and b of each layer.

    Raises Mistake, naming the place in the module, for what can't be taken.
    """
    layers: list[Layer] = []
    places: list[nn.Linear | nn.Conv2d] = []
    found: dict[str, str] = {}  # an activation's name: where it stands first
    bare = ""  # a layer that no activation followed yet
    flat = False
    for place, part in _parts(module, "module"):
        where = f"{place}, {part}"
        if type(part) is nn.Flatten and (part.start_dim, part.end_dim) == (1, -1):
            flat = True
        elif type(part) in ACTIVATIONS:
            if not bare:
                raise Mistake(f"{where}: an activation follows a layer, and here none came before it")
            if isinstance(part, nn.Hardtanh) and (part.min_val, part.max_val) != (-1, 1):
                raise Mistake(f"{where}: can't be taken; nn.Hardtanh() clips to -1..1")
            found.setdefault(ACTIVATIONS[type(part)], where)
            bare = ""
        elif type(part) in (nn.Linear, nn.Conv2d):
            assert isinstance(part, nn.Linear | nn.Conv2d)
            if bare:
                raise Mistake(f"{where}: an activation must stand between it and {bare}; nn.Identity() is one")
            if any(part is other for other in places):
                raise Mistake(f"{where}: stands twice in the module; give each layer weights of its own")
            if isinstance(part, nn.Linear) and not flat and places and isinstance(places[-1], nn.Conv2d):
                raise Mistake(f"{where}: put nn.Flatten() before it, since nn.Linear takes the last axis alone")
            layers.append(_layer(part, where))
            places.append(part)
            bare = where
        else:
            raise Mistake(f"{where}: can't be taken; allowed are {TAKEN} in an nn.Sequential")
    if not places or not isinstance(places[-1], nn.Linear) or not bare:
        raise Mistake("the module must end with nn.Linear, without an activation: the loss applies softmax or sigmoid")
    if len(found) > 1:
        raise Mistake(
            f"all hidden layers have one kind of activation, here there are several: {'; '.join(found.values())}"
        )
    return layers, next(iter(found), "identity"), places


def _layer(part: nn.Linear | nn.Conv2d, where: str) -> Layer:
    if isinstance(part, nn.Linear):
        return Dense(part.out_features)
    square = all(len({*pair}) == 1 for pair in (part.kernel_size, part.stride, part.padding))
    if not square or isinstance(part.padding, str) or part.padding_mode != "zeros":
        raise Mistake(f"{where}: can't be taken; kernel, stride and padding must be square, and the padding zeros")
    if part.groups != 1 or {*part.dilation} != {1}:
        raise Mistake(f"{where}: can't be taken; groups and dilation must be 1")
    return Conv(part.out_channels, part.kernel_size[0], part.stride[0], int(part.padding[0]))
