"""pack_codes: uint8 codes to a flat bit stream of 1 to 8 bits a code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._call import call
from ._checks import check_codes, check_int
from ._define import define_op


def packed_bytes(numel: int, bits: int) -> int:
    """ceil(numel * bits / 8)"""
    return -(-numel * bits // 8)


def _prepare_pack(codes: Any, bits: Any) -> tuple[Tensor, int]:
    bits = check_int("pack_codes", "bits", bits, 1, 8)
    return check_codes("pack_codes", "codes", codes).contiguous(), bits


@define_op(
    "pack_codes(Tensor codes, int bits) -> Tensor",
    allocate=lambda codes, bits: codes.new_empty(packed_bytes(codes.numel(), bits)),
    prepare=_prepare_pack,
)
def reference(codes: Tensor, bits: int) -> Tensor:
    if codes.device.type == "cpu" and codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"pack_codes: codes must be below 2**{bits} = {1 << bits}, got {int(codes.max())}")
    positions = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = (codes.reshape(-1, 1) >> positions) & 1  # [numel, bits], low bit first
    stream = torch.nn.functional.pad(stream.reshape(-1), (0, -stream.numel() % 8)).reshape(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.int32, device=codes.device)
    return (stream * weights).sum(1).to(torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes as a little-endian bit stream: code i in bits [bits i, bits i + bits), unused bits 0. Format version 1.

    codes: [...], uint8, each below 2**bits.  bits: 1..8.
    Returns uint8 [ceil(numel * bits / 8)]. Raises ValueError for a code that does not fit on the CPU (accelerators keep
    its low bits), TypeError or ValueError for wrong types.
    """
    return call("pack_codes", *_prepare_pack(codes, bits))
