"""What ops on a packed weight share: the checks of (packed, centers, bits, shape), and its codes at any places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import check_centers, check_codes, check_int, check_same_device
from .pack_codes import packed_bytes


def check_shape(op: str, shape: Any) -> list[int]:
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise TypeError(f"{op}: shape must be a sequence of integers, got {type(shape).__name__}")
    return [check_int(op, "each size in shape", size, 0, 2**62) for size in shape]


def check_packed_bytes(op: str, packed: Any, bits: int, sizes: list[int]) -> Tensor:
    """A stream of just the length that holds the codes of this shape."""
    packed = check_codes(op, "packed", packed)
    needed = packed_bytes(math.prod(sizes), bits)
    if packed.dim() != 1 or packed.numel() != needed:
        raise ValueError(
            f"{op}: packed must have shape ({needed},) to hold {tuple(sizes)} codes of {bits} bits, "
            f"got {tuple(packed.shape)}"
        )
    return packed.contiguous()


def check_packed(op: str, packed: Any, centers: Any, bits: Any, shape: Any) -> tuple[Tensor, Tensor, int, list[int]]:
    """A packed weight: a stream of the right length, centers whose rows divide it, no more of them than codes can name."""
    bits = check_int(op, "bits", bits, 1, 8)
    sizes = check_shape(op, shape)
    packed = check_packed_bytes(op, packed, bits, sizes)
    c = check_centers(op, centers, math.prod(sizes), what="the weight")
    if c.shape[-1] > 1 << bits:
        raise ValueError(f"{op}: {bits} bits tell {1 << bits} centers apart, got rows of {c.shape[-1]}")
    check_same_device(op, packed=packed, centers=c)
    return packed, c.contiguous(), bits, sizes


def codes_at(packed: Tensor, bits: int, places: Tensor) -> Tensor:
    """The codes number `places` (int64, any shape) of the stream, int64: each lies within two bytes."""
    byte, below = places * bits // 8, places * bits % 8
    low = packed[byte].long()
    high = packed[(byte + 1).clamp(max=max(packed.numel() - 1, 0))].long()
    return ((low | high << 8) >> below) & ((1 << bits) - 1)


def centers_at(op: str, packed: Tensor, c: Tensor, bits: int, length: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """Row of centers and code of each place, int64; codes past the last center raise on the CPU and are clamped elsewhere.

    c: [G, m].  length: weights a row of centers.
    """
    codes, levels = codes_at(packed, bits, places), c.shape[-1]
    if packed.device.type == "cpu":
        if codes.numel() and int(codes.max()) >= levels:
            raise ValueError(f"{op}: codes must be below m = {levels}, got {int(codes.max())}")
    else:
        codes = codes.clamp(max=levels - 1)  # looking at the values would make an accelerator wait
    return torch.div(places, max(length, 1), rounding_mode="floor"), codes
