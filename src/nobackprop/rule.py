"""What a learning rule is: it says which error reaches each layer; the layers turn errors into gradients."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nobackprop.layers import Shape
from nobackprop.losses import Loss
from nobackprop.network import Network, Weights

Draw = Callable[[str, Shape], Tensor]


@dataclass(frozen=True)
class Batch:
    """One mini-batch: inputs x (N, *in_shape) and targets y (N, outputs)."""

    x: Tensor
    y: Tensor
    loss: Loss

    def error(self, z: Tensor) -> Tensor:
        """The error at the output, per sample: the derivative of the loss by the logits z, (N, outputs)."""
        return self.loss.error(z, self.y)


@dataclass(frozen=True)
class Rule(ABC):
    """A learning rule: a frozen dataclass of the paper's hyper-parameters, with pure methods over a dict of weights.

    `grads` is all that a rule must have. It runs without autograd, possibly under `torch.func.vmap` (so: no random
    numbers, no branch on a tensor's value, nothing in place on its inputs). Errors are per sample; the mean over the
    batch is taken once, in `net.hebbian`.
    """

    @abstractmethod
    def grads(self, net: Network, w: Weights, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The gradient of each weight that this rule changes, by name, and the logits (N, outputs)."""

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
