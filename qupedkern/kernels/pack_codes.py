"""pack_codes in Triton: a word of codes and its bytes at a time. Reads a byte and writes `bits` bits a code: bound by memory."""

from __future__ import annotations

from torch import Tensor

from ._bits import pack


def pack_codes(codes: Tensor, bits: int, out: Tensor) -> None:
    pack(codes, bits, out)
