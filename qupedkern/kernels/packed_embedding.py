"""packed_embedding in Triton: a program a row looked up and block of it. Reads the bytes of those rows, writes values: bound by
memory. Indices outside the table are clamped. The gradient runs eager: lookups scatter, and order would need a sort."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._bits import code_at

_BLOCK = 1024  # values a program, at most


@triton.jit
def _packed_embedding(
    indices, packed, centers, out, count, width, blocks, length, total,
    BITS: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr, ONE_ROW: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    lookup = (program // blocks).to(tl.int64)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    index = tl.minimum(tl.maximum(tl.load(indices + lookup), 0), count - 1)
    place = index * width + column
    code = tl.minimum(code_at(packed, place, here, total, BITS), M - 1)
    at = code if ONE_ROW else place // length * M + code
    tl.store(out + lookup * width + column, tl.load(centers + at, mask=here), mask=here)


def packed_embedding(
    indices: Tensor, packed: Tensor, centers: Tensor, bits: int, shape: list[int], out: Tensor
) -> None:
    if not out.numel():
        return
    (count, width), m = shape, centers.shape[-1]
    groups = centers.numel() // m
    block = min(triton.next_power_of_2(width), _BLOCK)
    blocks = -(-width // block)
    _packed_embedding[(indices.numel() * blocks,)](
        indices, packed, centers, out, count, width, blocks, count * width // groups, packed.numel(), bits, m, block,
        groups == 1, num_warps=max(1, block // 256),
    )  # fmt: skip
