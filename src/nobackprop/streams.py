"""Random streams: every random number of a run comes from one of these, and from nothing else."""

from hashlib import blake2b

import torch


def stream(seed: int, *names: object) -> torch.Generator:
    """A CPU generator that is a function of the seed and the names alone.

    What one tensor or epoch draws can't depend on what else was drawn before it, so the same seed gives every rule
    the same classes, split, batch order and initial weights, on every device.
    """
    key = "/".join(str(part) for part in (seed, *names))
    number = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") >> 1  # manual_seed takes 63 bits
    return torch.Generator().manual_seed(number)
