"""Hypothesis strategies: what is valid for each op, hostile on purpose, shrinking to a small shape.

INPUTS[op](limits) draws the arguments of the public function, or of the op itself for a `_backward` op. A new op needs one
function here, or in a file of its family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from qupedkern.ops import OPS
from qupedkern.ops._rows import compute_dtype

from .list_strategies import center_step_inputs, foreach_soft_quantize_inputs, quped_step_inputs
from .loss_strategies import distillation_loss_inputs
from .packed_strategies import (
    dequantize_packed_inputs,
    lut_linear_inputs,
    pack_codes_inputs,
    packed_embedding_inputs,
    unpack_codes_inputs,
)
from .row_strategies import (
    assign_inputs,
    dequantize_inputs,
    distance_inputs,
    hard_quantize_inputs,
    init_centers_inputs,
    prox_centers_inputs,
    prox_weights_inputs,
    soft_quantize_inputs,
)
from .row_strategies import masses as masses
from .values import CALM as CALM
from .values import DOUBLE as DOUBLE
from .values import FLOATS as FLOATS
from .values import HOSTILE as HOSTILE
from .values import LONG as LONG
from .values import Limits as Limits
from .values import gradients
from .values import norms as norms


@st.composite
def distillation_loss_backward_inputs(draw: DrawFn, limits: Limits = HOSTILE) -> tuple[Any, ...]:
    """The statistics are those of the logits: the op's own forward pass made them."""
    grad, *args = draw(_with_gradient("distillation_loss", _scalar)(limits))
    return (grad, *args, OPS["distillation_loss"].reference(*args)[1])


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
