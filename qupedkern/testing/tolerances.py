"""How far a correct kernel may be from the float64 reference. Every bound is derived where it stands; none was fitted.

BOUNDS[op](*op arguments in float64, u=, eta=) gives one bound per output. u is the unit roundoff of the compute type and eta
its smallest positive number: each operation is off by at most u times its result, or by eta where it underflows. Bounds are
of first order in u; `compare` multiplies by SECOND_ORDER for the terms in u^2. An infinite bound marks an element about
which nothing is claimed, and says why beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .bounds import ROUNDOFF as ROUNDOFF
from .bounds import SECOND_ORDER as SECOND_ORDER
from .bounds import SMALLEST as SMALLEST
from .bounds import assert_close as assert_close
from .bounds import with_output_rounding as with_output_rounding
from .loss_tolerances import distillation_loss, distillation_loss_backward
from .packed_tolerances import dequantize_packed_backward, lut_linear, lut_linear_backward, packed_embedding_backward
from .row_tolerances import (
    dequantize_backward,
    distance,
    distance_backward,
    exact,
    exact_where_decided,
    hard_quantize_backward,
    init_centers,
    prox_centers,
    prox_weights,
)
from .row_tolerances import undecided as undecided
from .soft_tolerances import (
    foreach_soft_quantize,
    foreach_soft_quantize_backward,
    soft_quantize,
    soft_quantize_backward,
)
from .step_tolerances import center_step, quped_step

BOUNDS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "assign": exact_where_decided,
    "center_step": center_step,
    "dequantize": exact,
    "dequantize_backward": dequantize_backward,
    "dequantize_packed": exact,
    "dequantize_packed_backward": dequantize_packed_backward,
    "distance": distance,
    "distance_backward": distance_backward,
    "distillation_loss": distillation_loss,
    "distillation_loss_backward": distillation_loss_backward,
    "foreach_soft_quantize": foreach_soft_quantize,
    "foreach_soft_quantize_backward": foreach_soft_quantize_backward,
    "hard_quantize": exact_where_decided,
    "hard_quantize_backward": hard_quantize_backward,
    "init_centers": init_centers,
    "lut_linear": lut_linear,
    "lut_linear_backward": lut_linear_backward,
    "pack_codes": exact,
    "packed_embedding": exact,
    "packed_embedding_backward": packed_embedding_backward,
    "prox_centers": prox_centers,
    "prox_weights": prox_weights,
    "quped_step": quped_step,
    "soft_quantize": soft_quantize,
    "soft_quantize_backward": soft_quantize_backward,
    "unpack_codes": exact,
}
