"""Losses: each gives the value to report and the error at the output that a rule sends down, both per sample.

Shapes: logits z (N, outputs); labels (N,) int64; targets y (N, outputs), in the dtype of z.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nobackprop.mistakes import Mistake


@dataclass(frozen=True)
class Loss(ABC):
    """A loss for `classes` classes. Raises Mistake for fewer than two."""

    classes: int

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise Mistake(f"{type(self).__name__} needs at least 2 classes, got {self.classes}")

    @property
    def outputs(self) -> int:
        """How many output units the net needs."""
        return self.classes

    def target(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """One-hot targets (N, outputs) of labels (N,)."""
        return F.one_hot(labels, self.classes).to(dtype)

    def predict(self, z: Tensor) -> Tensor:
        """The most likely label (..., ) of logits (..., outputs)."""
        return z.argmax(-1)

    @abstractmethod
    def value(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample, (N,)."""

    @abstractmethod
    def error(self, z: Tensor, y: Tensor) -> Tensor:
        """The derivative of each sample's loss by its logits, (N, outputs)."""


class SoftmaxCrossEntropy(Loss):
    """`-log softmax(z)[label]`, with one output unit for each class."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return -(y * F.log_softmax(z, -1)).sum(-1)

    def error(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.softmax(z, -1) - y


class SquaredError(Loss):
    """`|z - y|^2 / 2` with one-hot y and one linear output unit for each class."""

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (z - y).square().sum(-1) / 2

    def error(self, z: Tensor, y: Tensor) -> Tensor:
        return z - y


class SigmoidCrossEntropy(Loss):
    """Binary cross-entropy, summed over units: one for each class. Two classes share one, with label 1 where z > 0."""

    @property
    def outputs(self) -> int:
        return 1 if self.classes == 2 else self.classes

    def target(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        return super().target(labels, dtype)[:, -self.outputs :]

    def predict(self, z: Tensor) -> Tensor:
        return super().predict(z) if self.classes > 2 else (z.squeeze(-1) > 0).long()

    def value(self, z: Tensor, y: Tensor) -> Tensor:
        return (F.softplus(z) - y * z).sum(-1)

    def error(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(z) - y


def cross_entropy(classes: int) -> Loss:
    """The loss of the mDFA paper: one sigmoid output unit for two classes, softmax for more."""
    return SigmoidCrossEntropy(classes) if classes == 2 else SoftmaxCrossEntropy(classes)
