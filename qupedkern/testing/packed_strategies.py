"""Inputs of the ops on codes as a bit stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from qupedkern.ops import OPS

from .values import (
    CALM,
    HOSTILE,
    LEVELS,
    LONG,
    Limits,
    centers,
    codes,
    gradients,
    group_counts_and_lengths,
    layouts,
    seeded,
    shapes,
)

bits_per_code = st.integers(1, 8)


@st.composite
def pack_codes_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    bits = draw(bits_per_code)
    numel = draw(st.sampled_from([n for n in limits.lengths if n <= limits.numel]))
    return draw(codes(1 << bits, draw(shapes(numel)), limits)), bits


@st.composite
def unpack_codes_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    bits = draw(bits_per_code)
    shape = draw(shapes(draw(st.sampled_from([n for n in limits.lengths if n <= limits.numel]))))
    packed = draw(codes(256, (-(-math.prod(shape) * bits // 8),), limits))
    return packed, bits, shape


# In and out around the lanes (16), the codes of a chunk (128) and ragged on purpose.
_FEATURES = (1, 16, 3, 0, 7, 8, 17, 31, 32, 33, 64, 100, 127, 128, 129, 256, 264, 500)


@st.composite
def weight_shapes(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if limits.lengths is LONG.lengths:
        return draw(st.sampled_from(((3, 10_001), (40, 1024), (1, 33_000))))
    few = [n for n in _FEATURES if n * n <= 4 * limits.numel] if limits.hostile else [2, 3, 4]
    out = draw(st.sampled_from(few))
    return out, draw(st.sampled_from([n for n in few if n * out <= 2 * limits.numel]))


@st.composite
def packed_weights(
    draw: DrawFn, shape: tuple[int, int], dtype: torch.dtype, limits: Limits = HOSTILE
) -> tuple[Tensor, Tensor, int]:
    """A bit stream of codes, their centers (one row, one a channel or one a block), and bits; fewer levels than bits allow too."""
    out, inputs = shape
    bits = draw(bits_per_code)
    if not limits.hostile:
        bits = min(bits, 3)
    levels = draw(st.sampled_from(sorted({1 << bits, max((1 << bits) - 1, 2)})))
    blocks = [g for g in (1, out, out * inputs, 2 * out, inputs) if g and out * inputs % g == 0]
    groups = draw(st.sampled_from([None, *blocks]))
    if groups is not None and groups * levels > limits.work // 10:
        groups = None
    c = draw(centers(groups, levels, dtype, limits))
    values = seeded(draw).integers(0, levels, size=shape, dtype=np.uint8)
    packed = OPS["pack_codes"].reference(torch.from_numpy(values), bits)
    return draw(layouts(packed, limits)), draw(layouts(c, limits)), bits


@st.composite
def lut_linear_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    """Always a bias; what leaving it out means is a property of its own."""
    dtype = draw(st.sampled_from(limits.dtypes))
    half = dtype in (torch.bfloat16, torch.float16)
    shape = draw(weight_shapes(limits))
    packed, c, bits = draw(packed_weights(shape, torch.float32 if half and draw(st.booleans()) else dtype, limits))
    batches = ((1,), (3,), (), (2, 2), (0,), (5,), (16,), (17,), (33,)) if limits.hostile else ((2,), (1,), ())
    batch = draw(st.sampled_from(batches if limits.lengths is not LONG.lengths else ((1,), (5,), (18,))))
    x = draw(gradients((*batch, shape[1]), dtype, limits))
    if limits.hostile and not limits.finite and x.numel() and draw(st.integers(0, 4)) == 0:
        x = x.contiguous().clone()
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from((math.nan, math.inf, -math.inf)))
    bias = draw(gradients((shape[0],), draw(st.sampled_from((dtype, c.dtype))), limits))
    return x, packed, c, bias, bits, shape


@st.composite
def streams_and_centers(
    draw: DrawFn, limits: Limits, shape_of: Callable[[int, int], SearchStrategy[tuple[int, ...]]]
) -> tuple[Tensor, Tensor, int, tuple[int, ...]]:
    """packed, centers, bits and shape that belong together; bits may leave room for more centers than there are."""
    m = draw(st.sampled_from(LEVELS))
    bits = draw(st.integers((m - 1).bit_length(), 8))
    groups, length = draw(group_counts_and_lengths(m, limits))
    c = draw(centers(groups, m, draw(st.sampled_from(limits.dtypes)), limits))
    shape = draw(shape_of((groups or 1) * length, groups or 1))
    packed = OPS["pack_codes"].reference(draw(codes(m, shape, CALM)).contiguous(), bits)
    return draw(layouts(packed, limits)), draw(layouts(c, limits)), bits, shape


def dequantize_packed_inputs(limits: Limits = HOSTILE) -> SearchStrategy[tuple[Any, ...]]:
    return streams_and_centers(limits, shapes)


def _table_shapes(numel: int, groups: int) -> SearchStrategy[tuple[int, ...]]:
    """[V, D] of `numel` elements: rows that share centers, have their own, several, or end inside a block of them."""
    widths = [d for d in (1, 3, 5, 7, 8, 16, 17, 33, numel // groups, numel) if d and numel % d == 0] or [1]
    return st.sampled_from(widths).map(lambda width: (numel // width, width))


@st.composite
def packed_embedding_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    packed, c, bits, shape = draw(streams_and_centers(limits, _table_shapes))
    most = min(max(limits.numel // shape[1], 1), 300) if shape[0] else 0
    count = draw(st.sampled_from([n for n in (1, 2, 3, 7, 0, 20, 64, 300) if n <= most] or [0]))
    index = torch.from_numpy(seeded(draw).integers(0, max(shape[0], 1), size=count))
    if limits.hostile and count and draw(st.booleans()):
        index[count // 2 :] = index[0]  # one row many times
    index = index.reshape(draw(shapes(count, 0))).to(draw(st.sampled_from((torch.int64, torch.int32))))
    return draw(layouts(index, limits)), packed, c, bits, shape
