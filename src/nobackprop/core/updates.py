"""How the gradients of a mini-batch become one update: one option, the same for every rule.

Each takes a gradient (S, ...), which is a mean over the batch with one slice for each seed, and the number of samples.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def mean(gradient: Tensor, samples: int) -> Tensor:
    """The mean over the batch, so that learning rates are per batch."""
    return gradient


def total(gradient: Tensor, samples: int) -> Tensor:
    """The sum over the batch, so that learning rates are per sample."""
    return gradient * samples


def unit_norm(gradient: Tensor, samples: int) -> Tensor:
    """Rescales each seed's tensor to Frobenius norm 1: `dW / (|dW| + 1e-8)`, as in the LRA-E program."""
    axes = tuple(range(1, gradient.ndim))
    return gradient / (torch.linalg.vector_norm(gradient, dim=axes, keepdim=True) + 1e-8)


def unit_norm_relative(gradient: Tensor, samples: int) -> Tensor:
    """Like `unit_norm`, but also for the smallest gradients: `dW / |dW|`, and zero for zero."""
    axes = tuple(range(1, gradient.ndim))
    largest = gradient.abs().amax(axes, keepdim=True)
    scaled = gradient / torch.where(largest > 0, largest, 1)  # otherwise the squares of small entries would be zero
    return scaled / torch.linalg.vector_norm(scaled, dim=axes, keepdim=True).clamp(min=1)  # but for zero, 1 or more


UPDATES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": mean,
    "sum": total,
    "unit_norm": unit_norm,
    "unit_norm_relative": unit_norm_relative,
}
