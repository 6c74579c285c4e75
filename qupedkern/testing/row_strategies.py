"""Inputs of the ops on weights and rows of centers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from .values import (
    HOSTILE,
    LEVELS,
    LONG,
    Limits,
    centers,
    codes,
    group_counts_and_lengths,
    layouts,
    norms,
    seeded,
    shapes,
    sharpnesses,
    strengths,
    weights_and_centers,
)


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
    m = draw(st.sampled_from(LEVELS))
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
        step = torch.from_numpy(seeded(draw).normal(size=old.shape)).to(old.dtype)
        mu = (old + step * old.abs().amax() / 8).sort(dim=-1).values.clamp(*_domain(old))
        at = old
    method = draw(st.sampled_from(("exact", "counted", "authors")))
    return mu, x, draw(strengths(x, mu, limits)), draw(norms), method, at


def _domain(like: Tensor) -> tuple[float, float]:
    limit = torch.finfo(like.dtype).max / 8
    return -limit, limit


@st.composite
def masses(draw: DrawFn, x: Tensor, groups: int, limits: Limits = HOSTILE) -> Tensor:
    """Weights of weights for k-means: >= 0, none of the rows all 0; hostile ones are mostly 0, equal or far apart in size."""
    rng = seeded(draw)
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
