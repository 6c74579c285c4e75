"""The steps of torch.optim's SGD, Adam and AdamW on lists of tensors, in torch's own arithmetic; the eager half of quped_step."""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = list[Tensor]


def sgd(
    x: Tensors, total: Tensors, first: Tensors, lr: float, decay: float, momentum: float, dampening: float,
    nesterov: bool, step: int,
) -> None:  # fmt: skip
    """torch.optim.SGD, foreach, to the bit."""
    if decay != 0:
        total = list(torch._foreach_add(total, x, alpha=decay))
    if first:
        if step == 1:
            torch._foreach_copy_(first, total)
        else:
            torch._foreach_mul_(first, momentum)
            torch._foreach_add_(first, total, alpha=1 - dampening)
        total = list(torch._foreach_add(total, first, alpha=momentum)) if nesterov else first
    torch._foreach_add_(x, total, alpha=-lr)


def _square_root(values: Tensors) -> Tensors:
    """Correctly rounded. That of torch's float32 on the CPU is off by an ulp in a fifth of the cases, in a way of its own."""
    wide = torch._foreach_sqrt([v.double() for v in values])
    return [w.to(v.dtype) for w, v in zip(wide, values, strict=True)]


def adam(
    x: Tensors, total: Tensors, first: Tensors, second: Tensors, lr: float, decay: float, beta1: float,
    beta2: float, eps: float, step: int, decoupled: bool,
) -> None:  # fmt: skip
    """torch.optim.Adam and AdamW, foreach: moments to the bit, x but for the square root."""
    if decay != 0:
        if decoupled:
            torch._foreach_mul_(x, 1 - lr * decay)
        else:
            total = list(torch._foreach_add(total, x, alpha=decay))
    torch._foreach_lerp_(first, total, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, total, total, 1 - beta2)
    size = _square_root(second)
    torch._foreach_div_(size, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(size, eps)
    torch._foreach_addcdiv_(x, first, size, -lr / (1 - beta1**step))
