"""From uint8 pixels to a net's input."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """Pixels as floats in 0..1, then, if a mean and a standard deviation are given (one a channel), normalised."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def normalized(cls, images: Tensor) -> "Pixels":
        """With the mean and standard deviation of each channel over uint8 images (n, C, H, W)."""
        std, mean = zip(*(torch.std_mean(channel / 255) for channel in images.unbind(1)), strict=True)
        return cls(_floats(mean), tuple(max(s, 1e-6) for s in _floats(std)))

    def __call__(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The input for uint8 pixels (..., C, H, W), in the same shape."""
        x = pixels.to(dtype) / 255
        if self.mean is None or self.std is None:
            return x
        mean, std = (torch.tensor(v, dtype=dtype, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


def _floats(values: Iterable[Tensor]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
