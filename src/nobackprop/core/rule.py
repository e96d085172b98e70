"""What a learning rule is: it says which error reaches each layer; the layers turn errors into gradients."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from nobackprop.core.losses import Loss
from nobackprop.core.maps import Shape
from nobackprop.core.network import Network, Weights
from nobackprop.mistakes import Mistake

Draw = Callable[[str, Shape], Tensor]
Grads = tuple[dict[str, Tensor], Tensor | None]


@dataclass(frozen=True)
class Batch:
    """One mini-batch: inputs x (N, *in_shape), targets y (N, outputs) and what the rule's `noise` asks for, by name."""

    x: Tensor
    y: Tensor
    loss: Loss
    noise: Mapping[str, Tensor] = field(default_factory=dict)

    def error(self, z: Tensor) -> Tensor:
        """The error at the output, per sample: the derivative of the loss by the logits z, (N, outputs)."""
        return self.loss.error(z, self.y)


Phase = Callable[[Network, Weights, Batch], Grads]


@dataclass(frozen=True)
class Rule(ABC):
    """A learning rule: a frozen dataclass of the paper's hyper-parameters, with pure methods over a dict of weights.

    `grads` is all that a rule must have. It runs without autograd, possibly under `torch.func.vmap` (so: no random
    numbers but `batch.noise`, no branch on a tensor's value, nothing in place on its inputs). Errors are per sample;
    the mean over the batch is taken once, in `net.hebbian`.

    `refuses` says for which parts of a net the rule has no form, by kind (`pooling`, `normalization`, `shortcut`,
    `attention`, `activation` for one that stands before a product, `dropout`), and why: a source, or an identity that
    fails.
    """

    refuses: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def grads(self, net: Network, w: Weights, batch: Batch) -> Grads:
        """The gradient of each weight that this rule changes, by name, and the logits (N, outputs).

        None in the place of logits that would have to be computed for their own sake: then there are no training
        metrics.
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
        """The updates that make one step, in order, each like `grads` and from the weights that the last one left.

        Training metrics are those of the last one's logits; those of earlier ones are not looked at.
        """
        return (self.grads,)

    def all_grads(self, net: Network, w: Weights, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """What all phases give from the same weights (of two gradients of one weight the later), and the logits.

        For looking at a step without taking it; training goes through `phases`.
        """
        each = [phase(net, w, batch) for phase in self.phases()]
        logits = each[-1][1]
        grads = {name: g for grads, _ in each for name, g in grads.items()}
        return grads, self.logits(net, w, batch.x) if logits is None else logits

    def noise(self, net: Network, samples: int) -> dict[str, Shape]:
        """Shapes of the standard normal numbers that a step on so many samples needs, by name: `batch.noise[name]`.

        They are functions of seed, name and step, and the same for all phases of a step. Numbers of each sample's own
        have the samples on the first axis; the shapes of all others do not depend on `samples`.
        """
        return {}

    def logits(self, net: Network, w: Weights, x: Tensor) -> Tensor:
        """What the trained net says of x (N, *in_shape): logits (N, outputs)."""
        return net.logits(w, x)

    def other_logits(self, net: Network, w: Weights, x: Tensor) -> dict[str, Tensor]:
        """Other answers of the net, by name, whose accuracy is reported beside: `val/accuracy_<name>`."""
        return {}

    def measured(self, net: Network, w: Weights, batch: Batch) -> dict[str, Tensor]:
        """What there is to know of how this rule works on a batch, by name: numbers for the diagnostics."""
        return {}

    def stand_ins(self, net: Network, w: Weights, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, what of the rule's own stands in for a forward weight, and that weight: for the diagnostics.

        Weights of one letter (`E2`, `E3`, ...) stand in for W where all of them have its shapes.
        """
        found = {}
        for letter in sorted({name.rstrip("0123456789") for name in w} - {"W", "b"}):
            own = {l: w[f"{letter}{l}"] for l in range(1, net.L + 1) if f"{letter}{l}" in w}
            if all(t.shape == net.weight_shape(l) for l, t in own.items()):
                found |= {l: (t, w[f"W{l}"]) for l, t in own.items()}
        return found

    def feedback(self, net: Network, draw: Draw) -> dict[str, Tensor]:
        """The weights this rule needs besides W and b; `draw(name, shape)` gives one from `init.backward`."""
        return {}

    def nonnegative(self, net: Network) -> frozenset[str]:
        """Names of the weights that start non-negative: each initializer's draw is replaced by its absolute value."""
        return frozenset()

    def constrain(self, net: Network, w: Weights) -> dict[str, Tensor]:
        """Projections to put in the place of weights after each optimizer step, by name."""
        return {}

    def gain(self, name: str) -> float:
        """A factor on the update of the weight of that name, applied after the batch was made one update."""
        return 1.0
