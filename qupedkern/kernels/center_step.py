"""center_step in Triton: a program a row of centers, all tensors in one launch. A few hundred numbers: bound by the launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import FORWARD_BYTES
from ._tables import batches, pointer, tiles

_Tensors = list[Tensor]
_FIELDS = 7  # centers, center_grad, counts, sums, strength, rate, whether strength is one a row


@triton.jit
def _center_step(
    entries, lines, clip, GRADIENT: tl.constexpr, METHOD: tl.constexpr, L2: tl.constexpr, M: tl.constexpr,
    WIDTH: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    line = lines + tl.program_id(0).to(tl.int64) * 4
    row = tl.load(line + 1)
    entry = entries + tl.load(line) * FIELDS
    i = tl.arange(0, WIDTH)
    here = i < M
    centers = pointer(entry, 0, tl.float32, False) + row * M + i
    c = tl.load(centers, mask=here, other=0.0)
    moved = c
    if GRADIENT:
        g = tl.load(pointer(entry, 1, tl.float32, False) + row * M + i, mask=here, other=0.0)
        g = tl.where(g > clip, clip, tl.where(g < -clip, -clip, g))
        moved = c - tl.load(pointer(entry, 5, tl.float32, False)) * g
    if METHOD != "none":
        t = tl.load(pointer(entry, 4, tl.float32, False) + row * tl.load(entry + 6))
        counts = pointer(entry, 2, tl.int64, False) + row * 3 * M + i
        if L2:
            members = tl.load(counts, mask=here, other=0).to(tl.float32)
            sums = tl.load(pointer(entry, 3, tl.float32, False) + row * M + i, mask=here, other=0.0)
            share = tl.div_rn(0.5, t) + tl.maximum(members, 1.0)
            moved += tl.div_rn(sums + members * (c - moved), share)
        else:
            above, below = tl.load(counts + M, mask=here, other=0), tl.load(counts + 2 * M, mask=here, other=0)
            step = t * (above - below).to(tl.float32)
            moved = moved + step if METHOD == "counted" else moved - step
    tl.store(centers, tl.sort(tl.where(here, moved, float("inf"))), mask=here)


def center_step(
    centers: _Tensors, center_grad: _Tensors, counts: _Tensors, sums: _Tensors, strength: _Tensors, rate: Tensor,
    norm: str, method: str, clip: float,
) -> None:  # fmt: skip
    rates = [rate[i : i + 1] for i in range(len(centers))]
    for batch in batches(centers, centers, (), FORWARD_BYTES):
        table = tiles(batch, (centers, center_grad, counts, sums, strength, rates), centers, (strength,))
        _center_step[(table.lines.shape[0],)](
            table.entries, table.lines, clip, bool(center_grad), method, norm == "l2", batch.levels,
            max(2, triton.next_power_of_2(batch.levels)), _FIELDS, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def center_step_unsupported(centers: _Tensors, *rest: object) -> str | None:
    if any(c.dtype != torch.float32 for c in centers):
        return "centers must be float32"
    return None
