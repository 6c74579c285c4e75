"""Hypothesis strategies: what is valid for each op, hostile on purpose, shrinking to a small shape.

INPUTS[op](limits) draws the arguments of the public function, or of the op itself for a `_backward` op. A new op needs one
function here. Values come from a drawn seed with drawn kinds of trouble laid over them, so that large tensors stay cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from qupedkern.ops import OPS
from qupedkern.ops._rows import compute_dtype, midpoints

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Around the widths of vectors (4, 8, 16 lanes), of chunks (64) and of blocks (4,096).
_LENGTHS = (1, 2, 3, 0, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 257, 1000, 4095, 4096, 4097, 8193)


@dataclass(frozen=True)
class Limits:
    """What a draw may contain. hostile: infinities, NaN, ties, equal centers, extreme magnitudes, odd strides."""

    dtypes: tuple[torch.dtype, ...] = FLOATS
    hostile: bool = True
    finite: bool = False  # hostile, but x without NaN and infinities
    numel: int = 8200
    work: int = 150_000  # elements times centers: what a quick example may cost
    lengths: tuple[int, ...] = _LENGTHS  # weights a row


HOSTILE = Limits()
LONG = Limits((torch.float32, torch.bfloat16), numel=80_000, work=400_000, lengths=(70_001, 33_000, 10_001))
CALM = Limits((torch.float32,), hostile=False, numel=60)
DOUBLE = Limits((torch.float64,), hostile=False, numel=24)

_LEVELS = (2, 3, 4, 5, 8, 16, 17, 33, 255, 256)
_SPECIALS = ("center", "midpoint", "beside a midpoint", "beside a center", "zero", "-zero", "denormal", "huge")
_NONFINITE = ("nan", "inf", "-inf")
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _rng(draw: DrawFn) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


def _beside(values: Tensor, steps: Tensor) -> Tensor:
    """The floats `steps` ulps further from zero, in values' own type."""
    integers = values.contiguous().view(_INTEGERS[values.element_size()])
    steps = torch.where(values == 0, steps.abs(), steps)  # nothing lies nearer to zero than zero
    return (integers + steps.to(integers.dtype)).view(values.dtype)


def _scales(limits: Limits, dtype: torch.dtype) -> SearchStrategy[float]:
    info = torch.finfo(dtype)
    calm = [1.0, 0.05, 20.0]
    hostile = [info.tiny * 8, info.tiny / 8, info.max / 64]
    return st.sampled_from(calm + hostile if limits.hostile else calm)


@st.composite
def layouts(draw: DrawFn, values: Tensor, limits: Limits = HOSTILE) -> Tensor:
    """The same elements (an expanded one repeats its first row) behind other strides or an offset; gaps hold 0xA5."""
    kinds = ["contiguous", "offset"]
    if values.dim():
        kinds.append("strided")
    if values.dim() > 1:
        kinds += ["transposed", "expanded"]
    kind = draw(st.sampled_from(kinds)) if limits.hostile else "contiguous"
    if kind == "offset":
        skip = draw(st.integers(1, 7))
        buffer = torch.full((values.numel() + skip, values.element_size()), 0xA5, dtype=torch.uint8).view(values.dtype)
        return buffer.reshape(-1)[skip:].view(values.shape).copy_(values)
    if kind == "strided":
        shape = (*values.shape, 2 * values.element_size())
        return torch.full(shape, 0xA5, dtype=torch.uint8).view(values.dtype)[..., 0].copy_(values)
    if kind == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "expanded" and values.shape[0]:
        return values[:1].clone().expand(values.shape)
    return values.contiguous()


@st.composite
def shapes(draw: DrawFn, numel: int, groups: int = 1) -> tuple[int, ...]:
    """Shapes of `numel` elements, with and without a dimension for the groups."""
    choices: list[tuple[int, ...]] = [(numel,), (1, numel), (numel, 1)]
    if groups:
        choices += [(groups, numel // groups), (numel // groups, groups)]
    choices += [(numel // k, k) for k in (2, 3, 5) if numel % k == 0]
    if numel == 1:
        choices.append(())
    if numel == 0:
        choices.append((2, 0, 3))
    if numel % 4 == 0:
        choices.append((2, numel // 4, 2))
    return draw(st.sampled_from(choices))


def _center_row(kind: str, rng: np.random.Generator, m: int, scale: float, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max / 8
    if kind == "adjacent":
        start = torch.tensor([min(abs(rng.normal()) * scale, limit / 2)], dtype=dtype)
        return _beside(start.expand(m), torch.arange(m))
    if kind == "even":
        values = np.linspace(-1, 1, m)
    elif kind == "repeated":
        values = rng.choice(rng.normal(size=max(m // 2, 1)), m)
    elif kind == "constant":
        values = np.full(m, rng.normal())
    else:
        values = rng.normal(size=m)
    row = torch.from_numpy(np.clip(values * scale, -limit, limit)).to(dtype)
    return row.sort().values


@st.composite
def centers(
    draw: DrawFn,
    groups: int | None = None,
    levels: int | None = None,
    dtype: torch.dtype = torch.float32,
    limits: Limits = HOSTILE,
) -> Tensor:
    """Ascending rows, [m] for groups=None and else [groups, m]; hostile ones repeat, collapse or sit ulps apart."""
    m = levels or draw(st.sampled_from(_LEVELS))
    rng = _rng(draw)
    scale = draw(_scales(limits, dtype))
    kinds = ["spread", "even"] + (["repeated", "constant", "adjacent"] if limits.hostile else [])
    kind = draw(st.sampled_from([*kinds, "mixed"]))
    picked = [str(rng.choice(kinds)) if kind == "mixed" else kind for _ in range(groups or 1)]
    rows = torch.stack([_center_row(k, rng, m, scale, dtype) for k in picked])
    return rows[0] if groups is None else rows


def _special(kind: str, c: Tensor, shape: tuple[int, int], rng: np.random.Generator, dtype: torch.dtype) -> Tensor:
    """[G, n] values of one kind of trouble; c is [G, m] in the compute type, dtype the type of x."""
    info = torch.finfo(dtype)
    plain = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "zero": 0.0, "-zero": -0.0}
    if kind in plain:
        return torch.full(shape, plain[kind], dtype=c.dtype)
    sign = torch.from_numpy(rng.choice([-1.0, 1.0], size=shape)).to(c.dtype)
    if kind == "denormal":
        return sign * (info.tiny / 4)
    if kind == "huge":
        return sign * (info.max / 2)
    row = c if kind.endswith("center") else midpoints(c)
    picks = torch.from_numpy(rng.integers(0, row.shape[1], size=shape))
    values = row.gather(1, picks)
    if kind.startswith("beside"):
        values = _beside(values, torch.from_numpy(rng.choice([-1, 1], size=shape)))
    return values


@st.composite
def weights(draw: DrawFn, c: Tensor, shape: tuple[int, ...], dtype: torch.dtype, limits: Limits = HOSTILE) -> Tensor:
    """x of a shape and type, spread around the centers it will meet; hostile ones sit on and beside decisions."""
    rows = c.reshape(-1, c.shape[-1])
    rows = rows.to(compute_dtype(torch.empty(0, dtype=dtype)))
    count = math.prod(shape) // rows.shape[0]
    rng = _rng(draw)
    middle = (rows[:, :1] + rows[:, -1:]) / 2
    spread = torch.maximum(rows[:, -1:] - rows[:, :1], rows.abs().amax(1, keepdim=True) / 4)
    values = middle + 0.6 * spread * torch.from_numpy(rng.normal(size=(rows.shape[0], count))).to(rows.dtype)
    if limits.hostile:
        kinds = _SPECIALS if limits.finite else _SPECIALS + _NONFINITE
        for kind in draw(st.lists(st.sampled_from(kinds), max_size=4, unique=True)):
            here = torch.from_numpy(rng.random(values.shape) < rng.choice([0.05, 0.3, 1.0]))
            values = torch.where(here, _special(kind, rows, (rows.shape[0], count), rng, dtype), values)
        if limits.finite:
            values = values.clamp(-torch.finfo(dtype).max / 2, torch.finfo(dtype).max / 2)
    return draw(layouts(values.to(dtype).reshape(shape), limits))


@st.composite
def group_counts_and_lengths(draw: DrawFn, m: int, limits: Limits) -> tuple[int | None, int]:
    """Rows of centers (None for a single row [m]) and weights a row."""
    groups = draw(st.sampled_from((None, 1, 2, 3, 7)))
    most = min(limits.numel, limits.work // m) // (groups or 1)
    return groups, draw(st.sampled_from([n for n in limits.lengths if n <= most] or [1]))


@st.composite
def weights_and_centers(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Tensor, Tensor]:
    """x and centers that belong together."""
    dtype = draw(st.sampled_from(limits.dtypes))
    half = dtype in (torch.bfloat16, torch.float16)
    centers_dtype = draw(st.sampled_from((torch.float32, dtype))) if half else dtype
    m = draw(st.sampled_from(_LEVELS if limits.hostile else _LEVELS[:6]))
    groups, length = draw(group_counts_and_lengths(m, limits))
    c = draw(centers(groups, m, centers_dtype, limits))
    shape = draw(shapes((groups or 1) * length, groups or 1))
    x = draw(weights(c, shape, dtype, limits))
    return x, draw(layouts(c, limits))


@st.composite
def per_rows(draw: DrawFn, values: list[float], x: Tensor, c: Tensor) -> float | Tensor:
    """A number, [1] or [G] out of these values."""
    groups = 1 if c.dim() == 1 else c.shape[0]
    form = draw(st.sampled_from(("number", "one", "rows")))
    if form == "number":
        return draw(st.sampled_from(values))
    picked = [draw(st.sampled_from(values)) for _ in range(1 if form == "one" else groups)]
    return torch.tensor(picked, dtype=compute_dtype(x))


@st.composite
def sharpnesses(draw: DrawFn, x: Tensor, c: Tensor, limits: Limits = HOSTILE) -> float | Tensor:
    """P > 0; calm ones scale with the rows' gap, as in training."""
    if limits.hostile:
        return draw(per_rows([10.0, 1e-3, 1.0, 333.3, 1e4], x, c))
    gap = float((c[..., -1] - c[..., 0]).max()) / (c.shape[-1] - 1)
    return draw(per_rows([3.0 / gap, 10.0 / gap], x, c))


def strengths(x: Tensor, c: Tensor, limits: Limits = HOSTILE) -> SearchStrategy[float | Tensor]:
    """t >= 0, up to magnitudes where t times a count overflows."""
    hostile = [1e-6, 1e4, torch.finfo(compute_dtype(x)).max / 4]
    return per_rows([0.0, 0.1, 1.0, *(hostile if limits.hostile else [])], x, c)


norms = st.sampled_from(("l1", "l2"))
bits_per_code = st.integers(1, 8)


@st.composite
def codes(draw: DrawFn, levels: int, shape: tuple[int, ...], limits: Limits = HOSTILE) -> Tensor:
    """uint8, all below levels."""
    values = _rng(draw).integers(0, levels, size=shape, dtype=np.uint8, endpoint=False)
    return draw(layouts(torch.from_numpy(np.asarray(values)), limits))


@st.composite
def gradients(draw: DrawFn, shape: tuple[int, ...], dtype: torch.dtype, limits: Limits = HOSTILE) -> Tensor:
    """Finite, of ordinary and extreme size."""
    scale = draw(st.sampled_from([1.0, 1e-4, 100.0] if limits.hostile else [1.0]))
    values = torch.from_numpy(np.asarray(_rng(draw).normal(size=shape) * scale)).to(dtype)
    return draw(layouts(values, limits))


@st.composite
def soft_quantize_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    x, c = draw(weights_and_centers(limits))
    return x, c, draw(sharpnesses(x, c, limits))


@st.composite
def hard_quantize_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    return (*draw(weights_and_centers(limits)), draw(st.booleans()))


def assign_inputs(limits: Limits = HOSTILE) -> SearchStrategy[tuple[Any, ...]]:
    return weights_and_centers(limits)


@st.composite
def dequantize_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    m = draw(st.sampled_from(_LEVELS))
    groups, length = draw(group_counts_and_lengths(m, limits))
    c = draw(centers(groups, m, draw(st.sampled_from(limits.dtypes)), limits))
    shape = draw(shapes((groups or 1) * length, groups or 1))
    return draw(codes(m, shape, limits)), draw(layouts(c, limits))


@st.composite
def distance_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    return (*draw(weights_and_centers(limits)), draw(norms))


@st.composite
def prox_weights_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    x, c = draw(weights_and_centers(limits))
    return x, c, draw(strengths(x, c, limits)), draw(norms)


@st.composite
def prox_centers_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    x, old = draw(weights_and_centers(replace(limits, finite=True)))
    mu, at = old, None
    if draw(st.booleans()):  # as Algorithm 1 does: mu a gradient step away from the centers whose cells count
        step = torch.from_numpy(_rng(draw).normal(size=old.shape)).to(old.dtype)
        mu = (old + step * old.abs().amax() / 8).sort(dim=-1).values.clamp(*_domain(old))
        at = old
    method = draw(st.sampled_from(("exact", "counted", "authors")))
    return mu, x, draw(strengths(x, mu, limits)), draw(norms), method, at


def _domain(like: Tensor) -> tuple[float, float]:
    limit = torch.finfo(like.dtype).max / 8
    return -limit, limit


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
    values = _rng(draw).integers(0, levels, size=shape, dtype=np.uint8)
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
    m = draw(st.sampled_from(_LEVELS))
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
    index = torch.from_numpy(_rng(draw).integers(0, max(shape[0], 1), size=count))
    if limits.hostile and count and draw(st.booleans()):
        index[count // 2 :] = index[0]  # one row many times
    index = index.reshape(draw(shapes(count, 0))).to(draw(st.sampled_from((torch.int64, torch.int32))))
    return draw(layouts(index, limits)), packed, c, bits, shape


@st.composite
def masses(draw: DrawFn, x: Tensor, groups: int, limits: Limits = HOSTILE) -> Tensor:
    """Weights of weights for k-means: >= 0, none of the rows all 0; hostile ones are mostly 0, equal or far apart in size."""
    rng = _rng(draw)
    kinds = ["spread", "integers"] + (["mostly zero", "huge", "denormal", "far apart"] if limits.hostile else [])
    kind = draw(st.sampled_from(kinds))
    dtype = x.dtype if x.dtype == torch.float64 else draw(st.sampled_from((torch.float32, x.dtype)))
    info = torch.finfo(torch.float16 if dtype == torch.float16 else torch.float32)
    values: np.ndarray = rng.random((groups, x.numel() // groups)) + 0.1
    if kind == "integers":
        values = rng.integers(0, 4, values.shape).astype(float)
    elif kind == "mostly zero":
        values = values * (rng.random(values.shape) < 0.2)
    elif kind == "far apart":
        values = 10.0 ** rng.integers(-4, 4, values.shape)
    elif kind != "spread":
        values = values * (info.max / 4 if kind == "huge" else info.tiny / 2)
    values[:, 0] = np.maximum(values[:, 0], info.tiny)
    return draw(layouts(torch.from_numpy(values).to(dtype).reshape(x.shape), limits))


@st.composite
def init_centers_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    most = limits.numel if limits is LONG else min(limits.numel, 300)
    pairs = weights_and_centers(replace(limits, finite=True, numel=most))
    x, c = draw(pairs.filter(lambda pair: pair[0].numel() > 0))
    method = draw(st.sampled_from(("kmeans", "linspace", "quantile", "signed_mean")))
    groups = 1 if c.dim() == 1 else c.shape[0]
    if x.dtype == torch.float64:  # squares of the exact k-means are float64 too
        x = x.clamp(-1e100, 1e100)
    weights = draw(masses(x, groups, limits)) if method == "kmeans" and draw(st.booleans()) else None
    return x, 2 if method == "signed_mean" else min(c.shape[-1], 33), groups, method, weights


def _rule_out(draw: DrawFn, rng: np.random.Generator, logits: list[Tensor], limits: Limits) -> None:
    """Equal examples, and where infinities are allowed classes of probability 0, NaN and examples without a softmax."""
    kinds = ["same"] if limits.finite else ["same", "masked", "masked alike", "-inf row", "inf", "nan"]
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=2, unique=True)):
        student, teacher = (z.reshape(-1, z.shape[-1]) for z in logits)
        if not student.numel():
            return
        row, column = int(rng.integers(student.shape[0])), int(rng.integers(student.shape[1]))
        if kind == "same":
            student[row] = teacher[row]
        elif kind.startswith("masked"):
            mask = torch.from_numpy(rng.random(student.shape) < 0.3)
            mask[:, column] = False
            for z in (
                (student, teacher) if kind == "masked alike" else (logits[int(rng.integers(2))].view(student.shape),)
            ):
                z.masked_fill_(mask, -math.inf)
        else:
            z = (student, teacher)[int(rng.integers(2))]
            z[row, slice(None) if kind == "-inf row" else column] = float(kind.removesuffix(" row"))


@st.composite
def distillation_loss_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    dtype = draw(st.sampled_from(limits.dtypes))
    batch = draw(st.sampled_from(((3,), (1,), (), (0,), (17,), (2, 3))))
    classes = draw(st.sampled_from((2, 10, 1, 17, 64, 100, 129) if limits.numel > 300 else (2, 3, 1)))
    if limits.lengths is LONG.lengths:
        batch, classes = (), draw(st.sampled_from(limits.lengths))
    rng = _rng(draw)
    most = torch.finfo(dtype).max / 64
    scales = st.sampled_from(
        [1.0, 30.0, 1e-3] + [300.0] * limits.hostile + [most] * (limits.hostile and not limits.finite)
    )
    logits = [
        torch.from_numpy(np.asarray(np.clip(rng.normal(size=(*batch, classes)), -8, 8) * draw(scales))).to(dtype)
        for _ in range(2)
    ]
    if limits.hostile:
        _rule_out(draw, rng, logits, limits)
    temperature = draw(st.sampled_from([1.0, 2.0, 0.5] + [20.0, 0.3] * limits.hostile))
    return draw(layouts(logits[0], limits)), draw(layouts(logits[1], limits)), temperature


@st.composite
def distillation_loss_backward_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    """The statistics are those of the logits: the op's own forward pass made them."""
    grad, *args = draw(_with_gradient("distillation_loss", _scalar)(limits))
    return (grad, *args, OPS["distillation_loss"].reference(*args)[1])


@st.composite
def foreach_soft_quantize_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    """Up to four tensors, each with its own shape, groups, levels and type, all of one compute type."""
    count = draw(st.integers(0 if limits.hostile else 1, 4))
    wide = draw(st.sampled_from(limits.dtypes)) == torch.float64
    dtypes = tuple(dtype for dtype in limits.dtypes if (dtype == torch.float64) == wide)
    fewer = replace(limits, dtypes=dtypes, numel=limits.numel // 2, work=limits.work // 2)
    drawn = [draw(soft_quantize_inputs(fewer)) for _ in range(count)]
    return tuple([args[i] for args in drawn] for i in range(3))


@st.composite
def _like_each(
    draw: DrawFn, x: list[Tensor], limits: Limits, wanted: bool = True, positive: bool = False
) -> list[Tensor]:
    """A gradient or a state for each x; an empty list where none is wanted."""
    drawn = [draw(gradients(tuple(v.shape), v.dtype, limits)) for v in x] if wanted else []
    return [v.abs() for v in drawn] if positive else drawn


@st.composite
def quped_step_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    """Up to three tensors of one type, and any optimizer, chain and output; half types, rounded in between, apart."""
    count = draw(st.integers(0 if limits.hostile else 1, 3))
    dtypes = (draw(st.sampled_from([d for d in limits.dtypes if d in (torch.float32, torch.float64)])),)
    fewer = replace(limits, dtypes=dtypes, numel=limits.numel // 2, work=limits.work // 2)
    drawn = [draw(prox_weights_inputs(fewer)) for _ in range(count)]
    x, c, t = ([args[i] for args in drawn] for i in range(3))
    chain = draw(st.sampled_from(("none", "soft", "hard", "straight_through")))
    optimizer = draw(st.sampled_from(("sgd", "adam", "adamw")))
    adaptive = optimizer != "sgd"
    beta1 = draw(st.sampled_from((0.9, 0.0, 0.5, 0.3)))
    beta2 = draw(st.sampled_from((0.999, 0.0, 0.9) if adaptive else (0.0, 0.1, 1.0)))
    momentum = adaptive or beta1 != 0
    plain = chain in ("none", "hard") or draw(st.booleans())
    grad = draw(_like_each(x, limits, plain))
    through = draw(_like_each(x, limits, chain != "none"))
    first = draw(_like_each(x, limits, momentum))
    second = draw(_like_each(x, limits, adaptive, positive=True))
    sharpness = [draw(sharpnesses(v, k, limits)) for v, k in zip(x, c, strict=True)] if chain == "soft" else []
    pack_bits = draw(st.sampled_from((0, 0, *(b for b in range(1, 9) if all(k.shape[-1] <= 1 << b for k in c)))))
    numbers = (
        draw(st.sampled_from((0.05, 0.0, 1e-3, 1.0))),
        draw(st.sampled_from((0.0, 1e-2, 0.3))),
        beta1,
        beta2,
        draw(st.sampled_from((1e-8, 1e-3))),
    )
    nesterov = not adaptive and momentum and draw(st.booleans())
    flags = (nesterov, draw(st.sampled_from((1, 2, 1000))), draw(st.booleans()), draw(st.booleans()), pack_bits)
    return (x, grad, through, first, second, c, sharpness, t, chain, optimizer, draw(norms), *numbers, *flags)


@st.composite
def center_step_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    """Centers with counts and sums as weights could have given them."""
    dtypes = (draw(st.sampled_from([d for d in limits.dtypes if d in (torch.float32, torch.float64)])),)
    fewer = replace(limits, dtypes=dtypes, finite=True, numel=limits.numel // 2, work=limits.work // 2)
    drawn = [draw(prox_weights_inputs(fewer)) for _ in range(draw(st.integers(0 if limits.hostile else 1, 3)))]
    norm = draw(norms)
    taken = [OPS["quped_step"].prepare([x], [x], [], [], [], [c], [], [t], norm=norm, lr=0.0) for x, c, t, _ in drawn]
    statistics = [OPS["quped_step"].reference([args[0][0].contiguous().clone()], *args[1:]) for args in taken]
    c = [args[5][0].clone() for args in taken]
    grad = draw(_like_each(c, limits, draw(st.booleans())))
    counts, sums = [s[1][0] for s in statistics], [s[2][0] for s in statistics if norm == "l2"]
    rate = draw(st.sampled_from(([0.1, 1e-3, 0.0][: len(c)] if len(c) < 4 else 0.1, 0.01)))
    method = draw(st.sampled_from(("counted", "none", "authors")))
    return c, grad, counts, sums, [t for _, _, t, _ in drawn], rate, norm, method, draw(st.sampled_from((10.0, 0.5)))


def _with_gradient(
    op: str, like: Callable[[tuple[Any, ...]], Any]
) -> Callable[[Limits], SearchStrategy[tuple[Any, ...]]]:
    """(grad, *op arguments) for <op>_backward; grad is shaped and typed like `like(op arguments)`, a tensor or a list."""

    @st.composite
    def inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
        args = OPS[op].prepare(*draw(INPUTS[op](limits)))
        output = like(args)
        if isinstance(output, list):
            return ([draw(gradients(tuple(out.shape), out.dtype, limits)) for out in output], *args)
        return (draw(gradients(tuple(output.shape), output.dtype, limits)), *args)

    return inputs


def _scalar(args: tuple[Any, ...]) -> Tensor:
    return torch.empty((), dtype=compute_dtype(args[0]))


INPUTS: dict[str, Callable[[Limits], SearchStrategy[tuple[Any, ...]]]] = {
    "assign": assign_inputs,
    "center_step": center_step_inputs,
    "dequantize": dequantize_inputs,
    "dequantize_backward": _with_gradient("dequantize", lambda args: torch.empty(args[0].shape, dtype=args[1].dtype)),
    "dequantize_packed": dequantize_packed_inputs,
    "dequantize_packed_backward": _with_gradient(
        "dequantize_packed", lambda args: torch.empty(args[3], dtype=args[1].dtype)
    ),
    "distance": distance_inputs,
    "distance_backward": _with_gradient("distance", _scalar),
    "distillation_loss": distillation_loss_inputs,
    "distillation_loss_backward": distillation_loss_backward_inputs,
    "foreach_soft_quantize": foreach_soft_quantize_inputs,
    "foreach_soft_quantize_backward": _with_gradient("foreach_soft_quantize", lambda args: args[0]),
    "hard_quantize": hard_quantize_inputs,
    "hard_quantize_backward": _with_gradient("hard_quantize", lambda args: args[0]),
    "init_centers": init_centers_inputs,
    "lut_linear": lut_linear_inputs,
    "lut_linear_backward": _with_gradient(
        "lut_linear", lambda args: torch.empty((*args[0].shape[:-1], args[5][0]), dtype=args[0].dtype)
    ),
    "pack_codes": pack_codes_inputs,
    "packed_embedding": packed_embedding_inputs,
    "packed_embedding_backward": _with_gradient(
        "packed_embedding", lambda args: torch.empty((*args[0].shape, args[4][1]), dtype=args[2].dtype)
    ),
    "prox_centers": prox_centers_inputs,
    "prox_weights": prox_weights_inputs,
    "quped_step": quped_step_inputs,
    "soft_quantize": soft_quantize_inputs,
    "soft_quantize_backward": _with_gradient("soft_quantize", lambda args: args[0]),
    "unpack_codes": unpack_codes_inputs,
}
