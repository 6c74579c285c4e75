"""unpack_codes: the inverse of pack_codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._call import call
from ._checks import check_int
from ._define import define_op
from ._packed import check_packed_bytes, check_shape


def _prepare(packed: Any, bits: Any, shape: Any) -> tuple[Tensor, int, list[int]]:
    bits = check_int("unpack_codes", "bits", bits, 1, 8)
    sizes = check_shape("unpack_codes", shape)
    return check_packed_bytes("unpack_codes", packed, bits, sizes), bits, sizes


@define_op(
    "unpack_codes(Tensor packed, int bits, int[] shape) -> Tensor",
    allocate=lambda packed, bits, shape: packed.new_empty(shape),
    prepare=_prepare,
)
def reference(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    numel = math.prod(shape)
    positions = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.reshape(-1, 1) >> positions) & 1).reshape(-1)[: numel * bits].reshape(numel, bits)
    weights = 2 ** torch.arange(bits, dtype=torch.int32, device=packed.device)
    return (stream * weights).sum(1).to(torch.uint8).reshape(list(shape))


def unpack_codes(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Codes from the bit stream of pack_codes; exact inverse for every bits and shape.

    packed: uint8 [ceil(prod(shape) * bits / 8)].  bits: 1..8.  shape: the shape the codes had.
    Returns uint8 codes of that shape. Raises TypeError or ValueError, the latter where the length does not fit the shape.
    """
    return call("unpack_codes", *_prepare(packed, bits, shape))
