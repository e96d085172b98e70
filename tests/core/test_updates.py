"""How a batch's mean gradient becomes one update, for stacked seeds."""

import pytest
import torch
from torch import Tensor

from nobackprop.core.updates import UPDATES


@pytest.fixture
def gradient() -> Tensor:
    """Three seeds' gradients of one kernel, of very different sizes."""
    g = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return g * torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64).view(3, 1, 1, 1, 1)


def test_mean_leaves_the_mean(gradient: Tensor) -> None:
    assert torch.equal(UPDATES["mean"](gradient, 50), gradient)


def test_sum_is_samples_times_the_mean(gradient: Tensor) -> None:
    torch.testing.assert_close(UPDATES["sum"](gradient, 50), 50 * gradient)


def test_unit_norm_rescales_each_seed(gradient: Tensor) -> None:
    update = UPDATES["unit_norm"](gradient, 50)
    for seed in range(3):
        norm = gradient[seed].square().sum().sqrt()
        torch.testing.assert_close(update[seed], gradient[seed] / (norm + 1e-8))


def test_unit_norm_of_biases_and_of_zero() -> None:
    update = UPDATES["unit_norm"](torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 50)
    torch.testing.assert_close(update, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e30])
def test_a_relative_unit_norm_is_1_whatever_the_size(size: float) -> None:
    g = torch.tensor([[3.0, -4.0], [0.0, 0.0], [0.0, 1.0]]) * size
    update = UPDATES["unit_norm_relative"](g, 50)
    torch.testing.assert_close(update, torch.tensor([[0.6, -0.8], [0.0, 0.0], [0.0, 1.0]]))


def test_a_relative_unit_norm_is_unit_norm_where_that_is_1(gradient: Tensor) -> None:
    update = UPDATES["unit_norm_relative"](gradient[1:], 50)
    torch.testing.assert_close(update, UPDATES["unit_norm"](gradient[1:], 50))


@pytest.mark.parametrize("update", UPDATES)
def test_the_gradient_given_is_left_alone(gradient: Tensor, update: str) -> None:
    before = gradient.clone()
    UPDATES[update](gradient, 50)
    assert torch.equal(gradient, before)
