"""quped_step: the whole weight update of many tensors in one pass: gradients, optimizer, prox, codes and statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._call import call
from ._checks import (
    check_choice,
    check_float,
    check_int,
    check_lists,
    check_norm,
    check_per_row,
    check_same_device,
    check_x_centers,
)
from ._define import OPS, define_op
from ._rows import cell_sum, compute_dtype, row_sum, split_rows
from ._torch_step import adam, sgd
from .assign import cell_codes
from .hard_quantize import nearest

CHAINS = ("none", "soft", "hard", "straight_through")
OPTIMIZERS = ("sgd", "adam", "adamw")
_OP = "quped_step"
_Tensors = list[Tensor]


class _Arguments(NamedTuple):
    """Of the op, in the order of its schema; _prepare makes them of what the public function is given."""

    x: _Tensors
    grad: _Tensors
    quantized_grad: _Tensors
    first: _Tensors
    second: _Tensors
    centers: _Tensors
    sharpness: _Tensors
    strength: _Tensors
    chain: str = "none"
    optimizer: str = "sgd"
    norm: str = "l1"
    lr: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 1e-8
    nesterov: bool = False
    step: int = 1
    clamp: bool = False
    codes: bool = False
    pack_bits: int = 0


_NUMBERS = ("lr", "weight_decay", "beta1", "beta2", "eps")


class QupedStep(NamedTuple):
    """What quped_step returns beside the tensors it wrote; a list that was not asked for is empty."""

    center_grad: list[Tensor]  # [m] or [G, m] a tensor; empty for chain "none"
    counts: list[Tensor]  # int64 [3, m] or [G, 3, m]: members, members above their center, members below it
    sums: list[Tensor]  # [m] or [G, m]: sum of x - c_k over the members of cell k; empty for norm "l1"
    distance: Tensor  # [number of tensors]: R(x, c) of each
    codes: list[Tensor]  # uint8, shaped like x or packed; empty unless codes


def _beside(name: str, tensors: Any, x: _Tensors, wanted: bool, when: str) -> _Tensors:
    """One tensor shaped and typed like each x, or, where none is wanted, an empty list."""
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{_OP}: {name} must be a list, one entry a tensor, got {type(tensors).__name__}")
    expected = len(x) if wanted else 0
    if len(tensors) != expected:
        raise ValueError(f"{_OP}: {name} must hold {expected} tensors {when}, got {len(tensors)}")
    for i, (tensor, like) in enumerate(zip(tensors, x, strict=False)):
        check_float(f"{_OP}: tensor {i}", name, tensor)
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            needed, came = (f"{t.dtype} of shape {tuple(t.shape)}" for t in (like, tensor))
            raise ValueError(f"{_OP}: tensor {i}: {name} must be like x, {needed}, got {came}")
        check_same_device(f"{_OP}: tensor {i}", x=like, **{name: tensor})
    return list(tensors)


def _check_distinct(written: _Tensors) -> None:
    if len({id(tensor) for tensor in written}) != len(written):
        raise ValueError(f"{_OP}: x, first and second must be different tensors, got one of them twice; pass it once")


def _check_numbers(given: _Arguments) -> None:
    for name in _NUMBERS:
        value = getattr(given, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{_OP}: {name} must be a number, got {type(value).__name__}")
    check_int(_OP, "step", given.step, 1, 2**53)
    optimizer = given.optimizer
    if given.nesterov and (optimizer != "sgd" or given.beta1 == 0):
        raise ValueError(f"{_OP}: nesterov needs optimizer 'sgd' with momentum, got {optimizer!r}")
    if optimizer != "sgd" and not (0 <= given.beta1 < 1 and 0 <= given.beta2 < 1):
        betas = f"({given.beta1}, {given.beta2})"
        raise ValueError(f"{_OP}: beta1 and beta2 must be in [0, 1) for {optimizer!r}, got {betas}")


def _prepare(*args: Any, **options: Any) -> tuple[Any, ...]:
    given = _Arguments(*args, **options)
    chain = check_choice(_OP, "chain", given.chain, CHAINS)
    optimizer = check_choice(_OP, "optimizer", given.optimizer, OPTIMIZERS)
    norm = check_norm(_OP, given.norm)
    _check_numbers(given)
    check_int(_OP, "pack_bits", given.pack_bits, 0, 8)
    check_lists(_OP, x=given.x, centers=given.centers, strength=given.strength)
    x = list(given.x)
    centers, sharpness, strength = _check_rows(given, x)
    through = chain in ("soft", "straight_through")
    has_grad = not (through and isinstance(given.grad, (list, tuple)) and not given.grad)
    momentum = optimizer != "sgd" or given.beta1 != 0
    grad = _beside("grad", given.grad, x, has_grad, f"for chain {chain!r}")
    quantized_grad = _beside("quantized_grad", given.quantized_grad, x, chain != "none", f"for chain {chain!r}")
    first = _beside("first", given.first, x, momentum, f"for {optimizer!r} with beta1 {given.beta1}")
    second = _beside("second", given.second, x, optimizer != "sgd", f"for {optimizer!r}")
    _check_distinct([*x, *first, *second])
    return given._replace(
        x=x,
        grad=grad,
        quantized_grad=quantized_grad,
        first=first,
        second=second,
        centers=centers,
        sharpness=sharpness,
        strength=strength,
        chain=chain,
        optimizer=optimizer,
        norm=norm,
        lr=float(given.lr),
        weight_decay=float(given.weight_decay),
        beta1=float(given.beta1),
        beta2=float(given.beta2),
        eps=float(given.eps),
        nesterov=bool(given.nesterov),
        clamp=bool(given.clamp),
        codes=bool(given.codes),
    )


def _check_rows(given: _Arguments, x: _Tensors) -> tuple[_Tensors, _Tensors, _Tensors]:
    """Centers, sharpness and strength of every tensor, by rows."""
    soft = given.chain == "soft"
    if soft:
        check_lists(_OP, x=x, sharpness=given.sharpness)
    elif not isinstance(given.sharpness, (list, tuple)) or given.sharpness:
        raise ValueError(f"{_OP}: sharpness must be an empty list unless chain is 'soft', got chain {given.chain!r}")
    rows: tuple[_Tensors, _Tensors, _Tensors] = ([], [], [])
    for i, (value, c) in enumerate(zip(x, given.centers, strict=True)):
        where = f"{_OP}: tensor {i}"
        _, c = check_x_centers(where, value, c)
        check_same_device(where, **{"tensor 0": x[0], f"tensor {i}": value})
        if value.dtype != x[0].dtype:
            raise TypeError(f"{where}: all x must have one type, {x[0].dtype}, got {value.dtype}; call once a type")
        if given.pack_bits and c.shape[-1] > 1 << given.pack_bits:
            raise ValueError(f"{where}: {c.shape[-1]} centers need more than the {given.pack_bits} bits of pack_bits")
        rows[0].append(c.detach())
        rows[2].append(check_per_row(where, "strength", given.strength[i], value, c))
        if soft:
            rows[1].append(check_per_row(where, "sharpness", given.sharpness[i], value, c))
    return rows


def _allocate(*args: Any) -> tuple[Any, ...]:
    a = _Arguments(*args)
    like_centers = [c.new_empty(c.shape) for c in a.centers] if a.chain != "none" else []
    counts = [c.new_empty((*c.shape[:-1], 3, c.shape[-1]), dtype=torch.int64) for c in a.centers]
    sums = [c.new_empty(c.shape) for c in a.centers] if a.norm == "l2" else []
    distance = a.x[0].new_empty(len(a.x), dtype=compute_dtype(a.x[0])) if a.x else torch.empty(0)
    shapes = [(-(-v.numel() * a.pack_bits // 8),) if a.pack_bits else v.shape for v in a.x]
    coded = [v.new_empty(shape, dtype=torch.uint8) for v, shape in zip(a.x, shapes, strict=True)] if a.codes else []
    return like_centers, counts, sums, distance, coded


def _chained(
    chain: str, x: _Tensors, grad: _Tensors, through: _Tensors, centers: _Tensors, sharpness: _Tensors
) -> tuple[_Tensors, _Tensors]:
    """The gradient of x and that of the centers, at the old x."""
    if chain == "none":
        return grad, []
    if chain == "soft":
        backward = OPS["soft_quantize_backward"].reference
        pairs = [backward(*args) for args in zip(through, x, centers, sharpness, strict=True)]
    else:
        backward = OPS["hard_quantize_backward"].reference
        pairs = [backward(g, v, c, chain != "hard") for g, v, c in zip(through, x, centers, strict=True)]
    center_grad = [pair[1] for pair in pairs]
    if chain == "hard":
        return grad, center_grad
    chained = [pair[0] for pair in pairs]
    return (list(torch._foreach_add(grad, chained)) if grad else chained), center_grad


def _statistics(x: Tensor, centers: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, sums of x - c, R and codes of the weights as they are now."""
    values, c = split_rows(x, centers)
    index = cell_codes(values, c)
    m = c.shape[1]
    own = c.gather(1, index)

    def count(where: Tensor) -> Tensor:
        return torch.zeros(c.shape, dtype=torch.int64, device=c.device).scatter_add_(1, index, where.long())

    counts = torch.stack([count(torch.ones_like(index)), count(values > own), count(values < own)], dim=1)
    sums = cell_sum(values - own, index, m)
    gap = values - nearest(values, c)
    distance = row_sum((gap.abs() if norm == "l1" else gap * gap).reshape(1, -1)).reshape(())
    counts = counts.reshape(*centers.shape[:-1], 3, m)
    return counts, sums.reshape(centers.shape), distance, index.to(torch.uint8).reshape(x.shape)


@define_op(
    "quped_step(Tensor(a!)[] x, Tensor[] grad, Tensor[] quantized_grad, Tensor(b!)[] first, Tensor(c!)[] second,"
    " Tensor[] centers, Tensor[] sharpness, Tensor[] strength, str chain, str optimizer, str norm, float lr,"
    " float weight_decay, float beta1, float beta2, float eps, bool nesterov, int step, bool clamp, bool codes,"
    " int pack_bits) -> (Tensor[], Tensor[], Tensor[], Tensor, Tensor[])",
    allocate=_allocate,
    prepare=_prepare,
)
def reference(*args: Any) -> tuple[Any, ...]:
    a = _Arguments(*args)
    if not a.x:
        return [], [], [], torch.empty(0), []
    # Half types compute in float32 and are rounded once, when they are written.
    wide = compute_dtype(a.x[0])
    y, g, through, exp_avg, exp_avg_sq = (
        [v.to(wide) for v in part] for part in (a.x, a.grad, a.quantized_grad, a.first, a.second)
    )
    total, center_grad = _chained(a.chain, y, g, through, a.centers, a.sharpness)
    if a.optimizer == "sgd":
        sgd(y, total, exp_avg, a.lr, a.weight_decay, a.beta1, a.beta2, a.nesterov, a.step)
    else:
        decoupled = a.optimizer == "adamw"
        adam(y, total, exp_avg, exp_avg_sq, a.lr, a.weight_decay, a.beta1, a.beta2, a.eps, a.step, decoupled)
    prox = OPS["prox_weights"].reference
    for to, values, c, t in zip(a.x, y, a.centers, a.strength, strict=True):
        moved = prox(values, c, t, a.norm)
        to.copy_(moved.clamp_(-1, 1) if a.clamp else moved)
    if wide != a.x[0].dtype:
        for to, values in zip([*a.first, *a.second], [*exp_avg, *exp_avg_sq], strict=True):
            to.copy_(values)
    statistics = [_statistics(v, c, a.norm) for v, c in zip(a.x, a.centers, strict=True)]
    counts, sums, distances, coded = (list(column) for column in zip(*statistics, strict=True))
    if a.pack_bits and a.codes:
        coded = [OPS["pack_codes"].reference(index, a.pack_bits) for index in coded]
    return center_grad, counts, sums if a.norm == "l2" else [], torch.stack(distances), coded if a.codes else []


@torch.no_grad()
def quped_step(
    x: list[Tensor],
    grad: list[Tensor],
    quantized_grad: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    centers: list[Tensor],
    sharpness: list[float | Tensor],
    strength: list[float | Tensor],
    *,
    chain: str = "none",
    optimizer: str = "sgd",
    norm: str = "l1",
    lr: float,
    weight_decay: float = 0.0,
    beta1: float = 0.0,
    beta2: float = 0.0,
    eps: float = 1e-8,
    nesterov: bool = False,
    step: int = 1,
    clamp: bool = False,
    codes: bool = False,
    pack_bits: int = 0,
) -> QupedStep:
    """x <- prox_{t R(., c)}(x - eta g) over a list of tensors, in place, with what the centers' step needs of the new x.

    g = grad + chain(quantized_grad), by chain, at the old x:
      "none"              grad; quantized_grad is an empty list
      "soft"              grad + quantized_grad dS/dx; center_grad_k = sum quantized_grad dS/dc_k (soft_quantize)
      "hard"              grad; center_grad_k = sum of quantized_grad over cell k (hard_quantize)
      "straight_through"  grad + quantized_grad; center_grad as in "hard"
    x - eta g is a step of torch's optimizer with g as the gradient, in its own arithmetic and with its own state:
      "sgd"               beta1 is the momentum and beta2 the dampening; first holds the momentum buffers (written with g at
                          step 1), an empty list where beta1 is 0; second is an empty list
      "adam", "adamw"     first and second hold exp_avg and exp_avg_sq; decay coupled or decoupled; step counts from 1
    Then prox_weights with `strength` and `norm`, then, where `clamp`, x into [-1, 1]. Codes and statistics are those of the x
    that is written, in the cells of the given centers, by the rules of `assign`.

    x, grad, quantized_grad, first, second: lists of tensors, one of each a weight, alike in shape and type; grad may be an
    empty list where the chain gives a gradient. One float type and device a call. x, first and second are written.
    centers: [m] or [G, m] each.  sharpness (chain "soft", else an empty list), strength: a number, [1] or [G] each.
    pack_bits: 0 for codes shaped like x, or 1 to 8 for codes in the stream of pack_codes.
    Returns QupedStep(center_grad, counts, sums, distance, codes). Sums are of x - c_k, which keeps what a sum of x would
    cancel: the sum of x over cell k is sums_k + members_k c_k. Same bits for any number of threads.
    In float32 on the CPU x and the state equal torch.optim.SGD followed by prox_weights to the bit; so do Adam's moments, and
    its x but for one ulp of the square root, which torch rounds otherwise.
    Raises TypeError or ValueError, which name the tensor by its place in the list.
    QuPeD, Ozkara et al. 2021 (arXiv:2107.13892), Algorithm 1.
    """
    options = (chain, optimizer, norm, lr, weight_decay, beta1, beta2, eps, nesterov, step, clamp, codes, pack_bits)
    args = _prepare(x, grad, quantized_grad, first, second, centers, sharpness, strength, *options)
    return QupedStep(*call("quped_step", *args))
