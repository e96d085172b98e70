"""Scores against torchmetrics' and torch's own functions, several seeds at once, however the data is batched."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import accuracy

from nobackprop.core.losses import Loss, SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from nobackprop.training.metrics import Scores

SEEDS, SAMPLES = 3, 40
LOSSES = pytest.mark.parametrize(
    "loss",
    [SoftmaxCrossEntropy(10), SoftmaxCrossEntropy(5), SigmoidCrossEntropy(2)],
    ids=["ten_classes", "five_classes", "one_output"],
)


def _data(loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (S, N, outputs), labels (S, N) and a mask (S, N) with another number of True in each seed."""
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(SEEDS, SAMPLES, loss.outputs, generator=generator)
    labels = torch.randint(loss.classes, (SEEDS, SAMPLES), generator=generator)
    mask = torch.rand(SEEDS, SAMPLES, generator=generator) < torch.tensor([[0.9], [0.6], [0.3]])
    return z, labels, mask


def _expected(loss: Loss, z: Tensor, labels: Tensor) -> dict[str, float]:
    """One seed's scores, out of torch and torchmetrics."""
    if loss.outputs == 1:
        value = F.binary_cross_entropy_with_logits(z.squeeze(1), labels.float())
        return {"loss": float(value), "accuracy": float(accuracy(z.squeeze(1).sigmoid(), labels, task="binary"))}
    scores = {"loss": float(F.cross_entropy(z, labels))}
    for name, k in (("accuracy", 1), ("top5", 5)) if loss.classes > 5 else (("accuracy", 1),):
        scores[name] = float(accuracy(z, labels, task="multiclass", num_classes=loss.classes, average="micro", top_k=k))
    return scores


def _assert_scores(scores: Scores, expected: list[dict[str, float]]) -> None:
    computed = scores.compute()
    assert computed.keys() == expected[0].keys()
    for name, values in computed.items():
        assert values.shape == (len(expected),)
        assert values.tolist() == pytest.approx([e[name] for e in expected], rel=1e-5)


@LOSSES
def test_scores_of_each_seed(loss: Loss) -> None:
    z, labels, _ = _data(loss)
    scores = Scores(loss, SEEDS)
    scores.update(z, labels)
    _assert_scores(scores, [_expected(loss, z[s], labels[s]) for s in range(SEEDS)])


@LOSSES
def test_only_what_the_mask_says_counts(loss: Loss) -> None:
    z, labels, mask = _data(loss)
    scores = Scores(loss, SEEDS)
    scores.update(z, labels, mask)
    _assert_scores(scores, [_expected(loss, z[s][mask[s]], labels[s][mask[s]]) for s in range(SEEDS)])


@LOSSES
def test_masked_rows_may_hold_anything(loss: Loss) -> None:
    z, labels, mask = _data(loss)
    clean, dirty = Scores(loss, SEEDS), Scores(loss, SEEDS)
    clean.update(z, labels, mask)
    dirty.update(torch.where(mask.unsqueeze(-1), z, torch.nan), torch.where(mask, labels, 0), mask)
    torch.testing.assert_close(clean.compute(), dirty.compute(), rtol=0, atol=0)


@LOSSES
@pytest.mark.parametrize("size", [1, 7, 16])
def test_how_the_data_is_batched_does_not_matter(loss: Loss, size: int) -> None:
    z, labels, mask = _data(loss)
    whole, parts = Scores(loss, SEEDS), Scores(loss, SEEDS)
    whole.update(z, labels, mask)
    for batch in zip(z.split(size, 1), labels.split(size, 1), mask.split(size, 1), strict=True):
        parts.update(*batch)
    torch.testing.assert_close(whole.compute(), parts.compute(), rtol=1e-12, atol=0)


def test_a_mean_over_many_batches_does_not_drift() -> None:
    loss = SquaredError(2)
    scores = Scores(loss, 1)
    for _ in range(3000):
        scores.update(torch.tensor([[[1.1, 0.0]]]), torch.tensor([[0]]))
    assert scores.compute()["loss"].item() == pytest.approx(0.1**2 / 2, rel=1e-6)  # in float32 sums: 1e-5


def test_batches_with_and_without_a_mask_mix() -> None:
    loss = SoftmaxCrossEntropy(10)
    z, labels, mask = _data(loss)
    scores = Scores(loss, SEEDS)
    scores.update(z, labels)
    scores.update(z, labels, mask)
    keep = [torch.cat([torch.arange(SAMPLES), m.nonzero().squeeze(1)]) for m in mask]
    _assert_scores(scores, [_expected(loss, z[s][keep[s]], labels[s][keep[s]]) for s in range(SEEDS)])


def test_half_precision_logits_are_scored_in_full_precision() -> None:
    loss = SoftmaxCrossEntropy(10)
    z, labels, _ = _data(loss)
    scores = Scores(loss, SEEDS)
    scores.update(z.bfloat16(), labels)
    _assert_scores(scores, [_expected(loss, z[s].bfloat16().float(), labels[s]) for s in range(SEEDS)])


def test_reset_starts_anew_and_a_saved_state_goes_on() -> None:
    loss = SoftmaxCrossEntropy(10)
    z, labels, _ = _data(loss)
    scores = Scores(loss, SEEDS)
    scores.update(z.neg(), labels)
    scores.reset()
    scores.update(z[:, :15], labels[:, :15])
    resumed = Scores(loss, SEEDS)
    resumed.load_state_dict(scores.state_dict())
    resumed.update(z[:, 15:], labels[:, 15:])
    _assert_scores(resumed, [_expected(loss, z[s], labels[s]) for s in range(SEEDS)])
