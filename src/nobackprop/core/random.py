"""Random streams: every random number of a run comes from one of these, and from nothing else."""

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor


def stream(seed: int, *names: object) -> torch.Generator:
    """A CPU generator that is a function of the seed and the names alone.

    What one tensor or epoch draws can't depend on what was drawn before it. So the same seed gives every rule the same
    classes, split, batch order and initial weights, on every device.
    """
    key = "/".join(str(part) for part in (seed, *names))
    number = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") >> 1  # manual_seed takes 63 bits
    return torch.Generator().manual_seed(number)


def normal(shapes: Mapping[str, tuple[int, ...]], seed: int, *names: object) -> dict[str, Tensor]:
    """Standard normal numbers of those shapes, by name. Each tensor has a stream of its own, (seed, names, name)."""
    return {name: torch.randn(shape, generator=stream(seed, *names, name)) for name, shape in shapes.items()}
