"""What the first call of each op costs on a device. A Triton kernel is compiled then, once for each kind of arguments, and kept
on disk (TRITON_CACHE_DIR); the backends that are compiled beforehand have little to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import qupedkern as qk
from qupedkern.ops import OPS


@dataclass(frozen=True)
class FirstCall:
    """backend: that ran it.  first, second: milliseconds until the result of the process's first and second call is there."""

    op: str
    backend: str
    first: float
    second: float


def _calls(device: torch.device) -> Mapping[str, tuple[object, ...]]:
    """Arguments for each public op, small: a compilation does not depend on the length."""
    x, c = torch.linspace(-1, 1, 64 * 64, device=device), torch.tensor([-0.6, -0.1, 0.2, 0.7], device=device)
    codes = torch.arange(64 * 64, device=device).remainder(4).to(torch.uint8)
    packed, shape = qk.pack_codes(codes, 2), (64, 64)
    rows = x.reshape(64, 64)
    return {
        "assign": (x, c),
        "dequantize": (codes, c),
        "dequantize_packed": (packed, c, 2, shape),
        "distance": (x, c),
        "distillation_loss": (rows, rows.flip(0), 2.0),
        "foreach_soft_quantize": ([x, x[:64]], [c, c], [10.0, 10.0]),
        "hard_quantize": (x, c),
        "init_centers": (x, 4),
        "lut_linear": (rows[:1], packed, c, None, 2, shape),
        "pack_codes": (codes, 2),
        "packed_embedding": (torch.arange(8, device=device), packed, c, 2, shape),
        "prox_centers": (c, x, 0.1),
        "prox_weights": (x, c, 0.1),
        "soft_quantize": (x, c, 10.0),
        "unpack_codes": (packed, 2, shape),
    }


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def _with_gradients(value: object) -> object:
    """Floats as leaves that want a gradient, so that a call's backward has its first time too."""
    if isinstance(value, list):
        return [_with_gradients(part) for part in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value


def _forward_and_backward(op: str, args: tuple[object, ...]) -> None:
    if f"{op}_backward" not in OPS:
        with torch.no_grad():
            getattr(qk, op)(*args)
        return
    result = getattr(qk, op)(*(_with_gradients(value) for value in args))
    parts = [part.sum() for part in (result if isinstance(result, list) else [result]) if part.requires_grad]
    torch.stack(parts).sum().backward()


def _training_step(device: torch.device) -> Callable[[], object]:
    """A step of QuPeD: the soft weights' op, quped_step and center_step."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, device=device))
    qk.quantize_(model, bits=2, rule=lambda name, layer: True)
    optimizer = qk.QuPeD(model, torch.optim.SGD(model.parameters(), lr=0.01), total_steps=100)
    x = torch.linspace(-1, 1, 64, device=device).reshape(1, 64)
    return lambda: optimizer.step(lambda: model(x).square().mean())


def first_calls(device: str) -> list[FirstCall]:
    """Every public op and its gradient, and a training step, twice each. RuntimeError where torch has no such device."""
    try:
        torch.empty(0, device=(where := torch.device(device)))
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise RuntimeError(f"first-calls: torch has no device {device!r} here: {str(error).splitlines()[0]}") from error
    found = []
    for op, args in _calls(where).items():
        call = partial(_forward_and_backward, op, args)
        took = [_milliseconds(call, where) for _ in range(2)]
        found.append(FirstCall(op, qk.explain(op, *args).backend, *took))
    step = _training_step(where)
    took = [_milliseconds(step, where) for _ in range(2)]
    return [*found, FirstCall("a step of QuPeD", "as above", *took)]


def table(device: str) -> str:
    """first_calls as lines to print."""
    rows = [f"{'op and gradient on ' + device:<26} backend    first ms  second ms"]
    rows += [f"{row.op:<26} {row.backend:<8} {row.first:>10.2f} {row.second:>10.3f}" for row in first_calls(device)]
    return "\n".join(rows)
