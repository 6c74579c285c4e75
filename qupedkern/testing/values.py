"""What strategies draw from: lengths, layouts, centers, weights and gradients, hostile on purpose.

Values come from a drawn seed with drawn kinds of trouble laid over them, so that large tensors stay cheap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

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


LEVELS = (2, 3, 4, 5, 8, 16, 17, 33, 255, 256)


_SPECIALS = ("center", "midpoint", "beside a midpoint", "beside a center", "zero", "-zero", "denormal", "huge")


_NONFINITE = ("nan", "inf", "-inf")


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def seeded(draw: DrawFn) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


def _beside(values: Tensor, steps: Tensor) -> Tensor:
    """The floats `steps` ulps further from zero, in values' own type."""
    integers = values.contiguous().view(_INTEGERS[values.element_size()])
    steps = torch.where(values == 0, steps.abs(), steps)  # nothing lies nearer to zero than zero
    return (integers + steps.to(integers.dtype)).view(values.dtype)


def scales(limits: Limits, dtype: torch.dtype) -> SearchStrategy[float]:
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
    m = levels or draw(st.sampled_from(LEVELS))
    rng = seeded(draw)
    scale = draw(scales(limits, dtype))
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
    rng = seeded(draw)
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
    m = draw(st.sampled_from(LEVELS if limits.hostile else LEVELS[:6]))
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


@st.composite
def codes(draw: DrawFn, levels: int, shape: tuple[int, ...], limits: Limits = HOSTILE) -> Tensor:
    """uint8, all below levels."""
    values = seeded(draw).integers(0, levels, size=shape, dtype=np.uint8, endpoint=False)
    return draw(layouts(torch.from_numpy(np.asarray(values)), limits))


@st.composite
def gradients(draw: DrawFn, shape: tuple[int, ...], dtype: torch.dtype, limits: Limits = HOSTILE) -> Tensor:
    """Finite, of ordinary and extreme size."""
    scale = draw(st.sampled_from([1.0, 1e-4, 100.0] if limits.hostile else [1.0]))
    values = torch.from_numpy(np.asarray(seeded(draw).normal(size=shape) * scale)).to(dtype)
    return draw(layouts(values, limits))
