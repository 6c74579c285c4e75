"""Steps of torch's SGD and Adam on tiles: their operations in their order. Callers forbid contraction."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sgd(
    x, g, first, rate, decay, momentum, weight, DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    FIRST_STEP: tl.constexpr,
):  # fmt: skip
    """x and the momentum buffer after a step; rate: -lr, weight: 1 - dampening."""
    if DECAY:
        g = g + decay * x
    if MOMENTUM:
        if FIRST_STEP:
            first = g
        else:
            first = first * momentum + weight * g
        g = g + momentum * first if NESTEROV else first
    return x + rate * g, first


@triton.jit
def adam(
    x, g, first, second, rate, decay, beta1, weight1, beta2, weight2, root, eps, shrink, DECAY: tl.constexpr,
    DECOUPLED: tl.constexpr,
):  # fmt: skip
    """x and both moments; rate: -lr / (1 - beta1^step), root: sqrt(1 - beta2^step), weight: 1 - beta, shrink: 1 - lr decay."""
    if DECAY:
        if DECOUPLED:
            x = x * shrink
        else:
            g = g + decay * x
    # torch's lerp starts from its nearer end
    near, far = first + weight1 * (g - first), g - (g - first) * (1.0 - weight1)
    first = tl.where(weight1 < 0.5, near, far)
    second = second * beta2 + weight2 * g * g
    size = tl.div_rn(tl.sqrt_rn(second), root) + eps
    return x + rate * tl.div_rn(first, size), first, second
