"""What a learning rule is: it says which error reaches each layer; the layers turn errors into gradients."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from nobackprop.core.losses import Loss
from nobackprop.core.maps import Shape
from nobackprop.core.network import Network, Weights
from nobackprop.mistakes import Mistake

Draw = Callable[[str, Shape], Tensor]
Grads = tuple[dict[str, Tensor], Tensor | None]


@dataclass(frozen=True)
class Batch:
    """One mini-batch: inputs x (N, *in_shape), targets y (N, outputs), and other tensors of this step, by name.

    These are what the rule's `noise` asks for, and what earlier phases of the step have left.
    """

    x: Tensor
    y: Tensor
    loss: Loss
    noise: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def one_hot(self) -> Tensor:
        """The labels, (N, classes), also where one output unit stands for two classes."""
        return self.y if self.y.shape[1] > 1 else torch.cat([1 - self.y, self.y], 1)

    def error(self, z: Tensor) -> Tensor:
        """The error at the output, per sample: the derivative of the loss by the logits z, (N, outputs)."""
        return self.loss.error(z, self.y)

    def after(self, given: Mapping[str, Tensor], w: Weights) -> tuple[dict[str, Tensor], "Batch"]:
        """What a phase gave for the weights, and the batch as the next phase gets it, with all else that it gave."""
        grads, left = apart(given, w)
        return grads, replace(self, noise={**self.noise, **left}) if left else self


# What kinds of rules there are: how a layer learns what it did wrong.
FAMILIES = {
    "exact": "The error comes down through the weights that led up, as the chain rule has it.",
    "aligned feedback": "The output's error, or the label, comes through weights of its own, with which W aligns.",
    "targets": "Each layer gets a target for its activation, and learns from the distance.",
    "energies": "States of the net relax, or are nudged, and what that changes trains it.",
    "local losses": "Each layer has a loss of its own, and no error comes from the layers above.",
    "perturbation": "Something is changed at random, and what that does to the loss is the error.",
    "Hebbian": "What is active together is tied together, and labels train the output alone.",
    "others": "What belongs to none of these.",
}


def apart(given: Mapping[str, Tensor], w: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of what a phase gave, the gradients of weights, and what it leaves for the phases after it."""
    grads = {name: t for name, t in given.items() if name in w}
    return grads, {name: t for name, t in given.items() if name not in w}


def each(values: Tensor, like: Tensor) -> Tensor:
    """Values (N,) of samples, to be broadcast over tensors shaped like `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


Phase = Callable[[Network, Weights, Batch], Grads]


@dataclass(frozen=True)
class Rule(ABC):
    """A learning rule: a frozen dataclass of the paper's hyper-parameters, with pure methods over a dict of weights.

    `grads` is the only method that a rule must have. It runs without autograd, possibly under `torch.func.vmap`. So it
    draws no random numbers but takes them from `batch.noise`, it does not branch on a tensor's value, and it does not
    change its inputs in place. Errors are per sample; the mean over the batch is taken once, in `net.hebbian`.

    `refuses` names the kinds of parts of a net for which the rule has no form: `pooling`, `normalization`, `shortcut`,
    `attention`, `activation` (one that stands before a product) and `dropout`. For each it says why: a source, or an
    identity that fails.
    """

    family: ClassVar[str] = "others"  # one of FAMILIES
    refuses: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        """The gradient of each weight that this rule changes, by name, and the logits (N, outputs).

        The logits are None where they would have to be computed for their own sake. Then there are no training metrics.
        """

    def check(self, net: Network) -> None:
        """Raises Mistake where the net has a part for which this rule has no form, and says why."""
        for l, kind, part in net.parts():
            if kind in self.refuses:
                raise Mistake(
                    f"{type(self).__name__} does not train nets with {kind} (layer {l} has {part}): "
                    f"{self.refuses[kind]}. Choose another arch, or a rule that does (bp does all)"
                )

    def phases(self) -> tuple[Phase, ...]:
        """The updates that make one step, in order. Each is like `grads`, at the weights that the one before left.

        Training metrics are those of the last update's logits. A phase may give more tensors than gradients, under
        names that no weight has: the phases after it find them in `batch.noise`.
        """
        return (self.grads,)

    def all_grads(self, net: Network, w: Weights, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The gradients of all phases at the same weights, and the logits. A later gradient replaces an earlier one.

        It is for looking at a step without taking it. Training goes through `phases`. Raises Mistake where a phase
        gives anything but gradients and logits of the right shapes, or the last one what no weight's name has.
        """
        every, logits, given = {}, None, {}
        for phase in self.phases():
            given, logits = self._pair(phase(net, w, batch), batch)
            grads, batch = batch.after(given, w)
            every |= grads
        name = type(self).__name__
        if unknown := given.keys() - w.keys():
            raise Mistake(f"rule {name} gives gradients of {sorted(unknown)}, which are no weights")
        for of, g in every.items():
            if g.shape != w[of].shape:
                shapes = tuple(w[of].shape), tuple(g.shape)
                raise Mistake(f"rule {name} gives {of}, of shape {shapes[0]}, a gradient of shape {shapes[1]}")
        return every, self.logits(net, w, batch.x) if logits is None else logits

    def _pair(self, made: Any, batch: Batch) -> Grads:
        """What a phase gave. Raises Mistake where it is no pair of tensors by name and logits."""
        needed = f"a pair is needed: tensors by name in a dict, and logits of shape {tuple(batch.y.shape)} or None"
        match made:
            case Mapping() as given, Tensor() | None as logits if all(isinstance(t, Tensor) for t in given.values()):
                if logits is not None and logits.shape != batch.y.shape:
                    raise Mistake(f"rule {type(self).__name__} gives logits of shape {tuple(logits.shape)}; {needed}")
                return dict(given), logits
            case tuple():
                kinds = ", ".join(type(part).__name__ for part in made)
                raise Mistake(f"rule {type(self).__name__} gives ({kinds}) for a step; {needed}")
        raise Mistake(f"rule {type(self).__name__} gives an object of type {type(made).__name__} for a step; {needed}")

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        """Shapes of the standard normal numbers that a step on so many samples needs, by name: `batch.noise[name]`.

        They are functions of seed, name and step, and the same for all phases of a step. Numbers that belong to samples
        have the samples on their first axis. The shapes of all others do not depend on `samples`.
        """
        return {}

    def logits(self, net: Network, w: Weights, x: Tensor) -> Tensor:
        """The prediction of the trained net for x (N, *in_shape): logits (N, outputs)."""
        return net.logits(w, x)

    def other_logits(self, net: Network, w: Weights, x: Tensor) -> dict[str, Tensor]:
        """Other answers of the net, by name. Their accuracy is reported, too, as `val/accuracy_<name>`."""
        return {}

    def measured(self, net: Network, w: Weights, batch: Batch) -> dict[str, Tensor]:
        """Numbers for the diagnostics, by name, that tell how this rule works on a batch."""
        return {}

    def stand_ins(self, net: Network, w: Weights, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, the rule's own weight that stands in for a forward weight, and that weight, for the diagnostics.

        Weights of one letter (`E2`, `E3`, ...) stand in for W where all of them have the shapes of W.
        """
        found = {}
        for letter in sorted({name.rstrip("0123456789") for name in w} - {"W", "b"}):
            own = {l: w[f"{letter}{l}"] for l in range(1, net.L + 1) if f"{letter}{l}" in w}
            if all(t.shape == net.weight_shape(l) for l, t in own.items()):
                found |= {l: (t, w[f"W{l}"]) for l, t in own.items()}
        return found

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        """The weights that this rule needs besides W and b. `draw(name, shape)` draws one by `init.backward`."""
        return {}

    def nonnegative(self, net: Network) -> frozenset[str]:
        """The names of the weights that start non-negative: an initializer's draw is replaced by its absolute value."""
        return frozenset()

    def constrain(self, net: Network, w: Weights) -> dict[str, Tensor]:
        """The weights, by name, that are projected after each optimizer step, with their projections."""
        return {}

    def gain(self, name: str) -> float:
        """A factor on the update of the weight of that name, applied after `update` made one update of the batch."""
        return 1.0
