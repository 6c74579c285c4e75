"""Randomness by name: every draw has a generator of its own, derived from the run's seed and what the draw is for.

So neither the order in which clients run nor a resume from a checkpoint can change a single draw, and no generator's
state needs to be stored.
"""

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed from (seed, purpose, numbers), the same on every machine and in every process.

    purpose: what the draw is for, "batches" say; numbers: which one of its kind, (round, client) say.
    """
    text = "/".join([str(int(seed)), purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator seeded with derive_seed."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *numbers))


def numpy_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A NumPy generator seeded with derive_seed."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose, *numbers)))
