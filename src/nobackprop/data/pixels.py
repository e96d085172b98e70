"""Makes a net's input of pixels."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """Pixels as floats. They are normalised if a mean and a standard deviation, one for each channel, are given.

    uint8 pixels are divided by 255; with `floats` they are floats already and taken as they are.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    floats: bool = False

    @classmethod
    def normalized(cls, images: Tensor) -> "Pixels":
        """Normalises by each channel's mean and standard deviation over images (n, C, H, W), uint8 or floats."""
        if images.is_floating_point():
            std, mean = torch.std_mean(images.double(), (0, 2, 3), correction=0)
            return cls(tuple(mean.tolist()), tuple(std.clamp(min=1e-6).tolist()), floats=True)
        values = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
        for part in images.split(1000):  # images may be mapped from a file larger than memory
            for channel, pixels in enumerate(part.unbind(1)):
                counts[channel] += torch.bincount(pixels.flatten(), minlength=256)
        share = counts / counts.sum(1, keepdim=True)
        mean = share @ values
        std = (share @ values.square() - mean.square()).clamp(min=0).sqrt()
        return cls(tuple(mean.tolist()), tuple(std.clamp(min=1e-6).tolist()))

    def __call__(self, pixels: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The input for pixels (..., C, H, W), in the same shape; written into `out`, in its type, if that is given."""
        x = torch.empty_like(pixels, dtype=dtype) if out is None else out
        x.copy_(pixels)
        if not self.floats:
            x.div_(255)
        if self.mean is not None and self.std is not None:
            x.sub_(_per_channel(self.mean, x.dtype, x.device)).div_(_per_channel(self.std, x.dtype, x.device))
        return x


@lru_cache(maxsize=8)
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor (C, 1, 1), made once, since a training step would wait for the copy to a GPU."""
    return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)
