"""Where a GPU's lut_linear stops reading codes: the weight is written out once, in scratch, and multiplied by torch."""

from __future__ import annotations

import math
from typing import Any

import torch

from ._invariance import batch_invariant

# Rows of x from which on, by its type. Estimates from bytes and rates: not measured yet.
WRITTEN_OUT = {torch.bfloat16: 768, torch.float16: 768, torch.float32: 128}


def is_written_out(op: str, args: tuple[Any, ...]) -> bool:
    """Whether this is a lut_linear of so many rows, with the batch not pinned."""
    if op != "lut_linear" or batch_invariant.pinned:
        return False
    x = args[0]
    return x.dtype in WRITTEN_OUT and math.prod(x.shape[:-1]) >= WRITTEN_OUT[x.dtype]
