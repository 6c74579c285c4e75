"""Inputs of distillation_loss: logits up to the ends of their type."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from .values import (
    HOSTILE,
    LONG,
    Limits,
    layouts,
    seeded,
)


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
    rng = seeded(draw)
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
