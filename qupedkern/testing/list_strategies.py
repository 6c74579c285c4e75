"""Inputs of the ops on lists of tensors: foreach_soft_quantize and the two steps of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from qupedkern.ops import OPS

from .row_strategies import prox_weights_inputs, soft_quantize_inputs
from .values import (
    HOSTILE,
    Limits,
    gradients,
    norms,
    sharpnesses,
)


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
