"""Loss values against torch's, errors against autograd, and what a loss says of the net's outputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nobackprop.core.losses import Loss, SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError, cross_entropy

CASES = [
    pytest.param(SoftmaxCrossEntropy(4), lambda z, y: F.cross_entropy(z, y.argmax(1), reduction="none"), id="softmax"),
    pytest.param(
        SigmoidCrossEntropy(2),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none").squeeze(1),
        id="sigmoid",
    ),
    pytest.param(
        SigmoidCrossEntropy(4),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1),
        id="sigmoids",
    ),
    pytest.param(SquaredError(4), lambda z, y: F.mse_loss(z, y, reduction="none").sum(1) / 2, id="squared_error"),
]


def _batch(loss: Loss) -> tuple[Tensor, Tensor]:
    """Logits, some of them large, and targets."""
    generator = torch.Generator().manual_seed(0)
    z = 20 * torch.randn(50, loss.outputs, dtype=torch.float64, generator=generator)
    labels = torch.randint(loss.classes, (50,), generator=generator)
    return z, loss.target(labels, z.dtype)


@pytest.mark.parametrize(("loss", "torchs"), CASES)
def test_value_is_torchs_for_each_sample(loss: Loss, torchs) -> None:
    z, y = _batch(loss)
    assert loss.value(z, y).shape == (50,)
    torch.testing.assert_close(loss.value(z, y), torchs(z, y))


@pytest.mark.parametrize(("loss", "torchs"), CASES)
def test_error_is_the_derivative_of_each_samples_value(loss: Loss, torchs) -> None:
    z, y = _batch(loss)
    (expected,) = torch.autograd.grad(torchs(z.requires_grad_(), y).sum(), z)
    torch.testing.assert_close(loss.error(z.detach(), y), expected)


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(4), SigmoidCrossEntropy(2)], ids=["softmax", "sigmoid"])
def test_large_logits_stay_finite(loss: Loss) -> None:
    z = torch.tensor([[1000.0, -1000.0, 0.0, 1.0][: loss.outputs]])
    y = loss.target(torch.tensor([loss.classes - 1]), z.dtype)
    for large in (z, -z):
        assert loss.value(large, y).isfinite().all()
        assert loss.error(large, y).isfinite().all()


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(4), SigmoidCrossEntropy(4), SquaredError(4)], ids=str)
def test_one_output_a_class(loss: Loss) -> None:
    assert loss.outputs == 4
    labels = torch.tensor([2, 0])
    y = loss.target(labels, torch.float64)
    assert y.dtype == torch.float64
    assert y.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert loss.predict(y).tolist() == [2, 0]
    assert loss.predict(torch.stack([y, y.flip(-1)])).tolist() == [[2, 0], [1, 3]]  # (S, N, outputs)


def test_sigmoid_has_one_output_for_two_classes() -> None:
    loss = SigmoidCrossEntropy(2)
    assert loss.outputs == 1
    assert loss.target(torch.tensor([1, 0]), torch.float64).tolist() == [[1], [0]]
    assert loss.target(torch.tensor([1, 0]), torch.float64).dtype == torch.float64
    assert loss.predict(torch.tensor([[-0.1], [0.0], [0.1]])).tolist() == [0, 0, 1]
    assert loss.predict(torch.tensor([[[-3.0], [2.0]]])).tolist() == [[0, 1]]


def test_cross_entropy_is_sigmoid_for_two_classes_and_softmax_for_more() -> None:
    assert cross_entropy(2) == SigmoidCrossEntropy(2)
    assert cross_entropy(3) == SoftmaxCrossEntropy(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftmaxCrossEntropy(1), "SoftmaxCrossEntropy needs at least 2 classes, got 1"),
        (lambda: SquaredError(0), "SquaredError needs at least 2 classes, got 0"),
        (lambda: SigmoidCrossEntropy(1), "SigmoidCrossEntropy needs at least 2 classes, got 1"),
        (lambda: cross_entropy(1), "at least 2 classes, got 1"),
    ],
    ids=["softmax_1", "squared_error_0", "sigmoid_1", "cross_entropy_1"],
)
def test_a_wrong_number_of_classes_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
