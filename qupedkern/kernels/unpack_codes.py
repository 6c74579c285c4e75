"""unpack_codes in Triton: the groups of pack_codes, read. Reads `bits` bits and writes a byte a code: bound by memory."""

from __future__ import annotations

from torch import Tensor

from ._bits import unpack


def unpack_codes(packed: Tensor, bits: int, shape: list[int], out: Tensor) -> None:
    unpack(packed, bits, out)
