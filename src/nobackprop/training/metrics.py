"""Accuracy and loss of several seeds at once: one torchmetrics metric with a vector state over the seeds."""

import torch
from torch import Tensor
from torchmetrics import Metric

from nobackprop.core.losses import Loss


class Scores(Metric):
    """Mean loss, accuracy and (with more than five classes) top-5 accuracy of each seed, as vectors (S,).

    `update` takes logits (S, N, outputs), labels (S, N) and, where rows are padded, mask (S, N): True where one counts.
    """

    full_state_update = False

    def __init__(self, loss: Loss, seeds: int) -> None:
        super().__init__()
        self.loss = loss
        self.names = ("loss", "accuracy", "top5") if loss.classes > 5 else ("loss", "accuracy")
        self.sums: Tensor
        self.count: Tensor
        # Sums in float64: a mean over 10^6 images must not depend on how they were batched.
        self.add_state("sums", torch.zeros(len(self.names), seeds, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(seeds, dtype=torch.int64), dist_reduce_fx="sum")
        self.persistent(True)  # a checkpoint in mid-epoch keeps the sums so far

    def update(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        z = logits.double()
        y = self.loss.target(labels.flatten(), z.dtype).unflatten(0, labels.shape)
        values = [self.loss.value(z, y), self.loss.predict(z) == labels]
        if len(self.names) == 3:
            values.append((z.topk(5).indices == labels.unsqueeze(-1)).any(-1))
        for i, value in enumerate(values):
            self.sums[i] += (value if mask is None else torch.where(mask, value, 0)).double().sum(1)
        self.count += labels.shape[1] if mask is None else mask.sum(1)

    def compute(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.sums / self.count, strict=True))
