"""What is timed on a GPU: one op on one large tensor, lut_linear on the shapes of large models, a model's weights in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import qupedkern as qk
from qupedkern.backends import select
from qupedkern.ops import OPS

Candidate = Callable[[], object]
LUT_SHAPES = ((8192, 28672), (8192, 8192), (4096, 11008), (4096, 4096))  # out, in
LUT_BATCHES = (1, 4, 16, 64, 256, 4096)
ROTATED_BYTES = 240 * 2**20  # of weights a row goes round, so that they come from memory and not from L2


@dataclass(frozen=True)
class GpuCase:
    """candidates: what is timed, by name; "kernel" first, the reference as "eager". bytes and operations a call.

    check() raises where the kernel's output is wrong; it runs before anything is timed.
    """

    group: str
    name: str
    backend: str
    bytes: float
    candidates: dict[str, Candidate]
    check: Callable[[], None]
    operations: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _close(got: Any, wanted: Any, what: str, tolerance: float) -> None:
    for one, other in zip(_flat(got), _flat(wanted), strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30)
        if not bool(error <= tolerance):
            raise AssertionError(f"{what}: relative error {float(error):.2g}, at most {tolerance:.2g} is right")


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for one in value for tensor in _flat(one)]


def _op(group: str, op: str, args: tuple[Any, ...], detail: str, moved: float, tolerance: float) -> GpuCase:
    call = getattr(torch.ops.qupedkern, op)
    reference = OPS[op].reference

    def check() -> None:
        _close(call(*args), reference(*args), f"{op} {detail}", tolerance)

    candidates: dict[str, Candidate] = {"kernel": lambda: call(*args), "eager": lambda: reference(*args)}
    return GpuCase(group, f"{op} {detail}", select(op, args), moved, candidates, check)


def single_tensors(device: str, numel: int, levels: tuple[int, ...] = (2, 4, 16)) -> Iterator[GpuCase]:
    """Each op on one tensor with one row of centers: float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        size, close = dtype.itemsize, 2e-6 if dtype == torch.float32 else 8e-3
        x = torch.randn(numel, device=device).to(dtype)
        g = torch.randn(numel, device=device).to(dtype)
        for m in levels:
            c = torch.linspace(-2, 2, m, device=device)
            P, t = torch.full((1,), 10 * (m - 1) / 4, device=device), torch.full((1,), 0.01, device=device)
            detail = f"{_short(dtype)} m={m}"
            yield _op("ops", "soft_quantize", (x, c, P), detail, 2 * size * numel, close)
            yield _op("ops", "soft_quantize_backward", (g, x, c, P), detail, 3 * size * numel, max(close, 1e-4))
            yield _op("ops", "hard_quantize_backward", (g, x, c, True), detail, 3 * size * numel, max(close, 1e-4))
            yield _op("ops", "prox_weights", (x, c, t, "l1"), detail, 2 * size * numel, close)
            yield _op("ops", "assign", (x, c), detail, (size + 1) * numel, 0.0)
            yield _op("ops", "distance", (x, c, "l1"), detail, size * numel, 1e-4)
            codes = OPS["assign"].reference(x, c)
            yield _op("ops", "dequantize", (codes, c.to(dtype)), detail, (size + 1) * numel, 0.0)
    for bits in (1, 2, 3, 4):
        codes = torch.randint(1 << bits, (numel,), device=device, dtype=torch.uint8)
        packed = qk.pack_codes(codes, bits)
        moved = numel * (1 + bits / 8)
        yield _op("ops", "pack_codes", (codes, bits), f"{bits} bits", moved, 0.0)
        yield _op("ops", "unpack_codes", (packed, bits, [numel]), f"{bits} bits", moved, 0.0)


def weight_steps(device: str, numel: int, levels: tuple[int, ...] = (2, 4, 16)) -> Iterator[GpuCase]:
    """quped_step on one float32 tensor: SGD with momentum and Adam, codes and counters in the pass. A rate of 0 keeps x."""
    for m in levels:
        for optimizer, moved in (("sgd", 21), ("adam", 29)):
            c, t = torch.linspace(-2, 2, m, device=device), torch.full((1,), 0.01, device=device)
            second = optimizer == "adam"

            def arguments(
                count: int, c: Tensor = c, t: Tensor = t, optimizer: str = optimizer, second: bool = second
            ) -> Any:
                x, g, first = (torch.randn(count, device=device) for _ in range(3))
                numbers = (0.0, 0.0, 0.9, 0.999 if second else 0.0, 1e-8, False, 2, False, True, 0)
                state = [torch.rand(count, device=device)] if second else []
                return ([x], [g], [], [first], state, [c], [], [t], "none", optimizer, "l1", *numbers)

            args = arguments(numel)

            def check(arguments: Callable[[int], Any] = arguments) -> None:
                mine = arguments(min(numel, 1 << 16))
                other = tuple([v.clone() for v in a] if isinstance(a, list) else a for a in mine)
                got, wanted = torch.ops.qupedkern.quped_step(*mine), OPS["quped_step"].reference(*other)
                _close(
                    [*_flat(got), mine[0][0], mine[3][0]],
                    [*_flat(wanted), other[0][0], other[3][0]],
                    "quped_step",
                    1e-4,
                )

            candidates: dict[str, Candidate] = {
                "kernel": lambda a=args: torch.ops.qupedkern.quped_step(*a),  # type: ignore[misc]
                "eager": lambda a=args: OPS["quped_step"].reference(*a),  # type: ignore[misc]
            }
            backend = select("quped_step", args)
            yield GpuCase("ops", f"quped_step {optimizer} m={m}", backend, moved * numel, candidates, check)


def _rotating(call: Callable[[Any], object], over: list[Any]) -> Candidate:
    turn = iter(range(10**12))
    return lambda: call(over[next(turn) % len(over)])


def lut_linear(
    device: str,
    bits: tuple[int, ...] = (4, 3, 2, 1),
    batches: tuple[int, ...] = LUT_BATCHES,
    shapes: tuple[tuple[int, int], ...] = LUT_SHAPES,
    rotated: int = ROTATED_BYTES,
) -> Iterator[GpuCase]:
    """lut_linear on random codes, one table, against torch's bfloat16 product with the same weights."""
    half = torch.bfloat16
    for out, inputs in shapes:
        for width in bits:
            c = torch.randn(1 << width, device=device).sort().values.to(half).float()
            size = out * inputs * width // 8
            copies = [torch.randint(256, (size,), device=device, dtype=torch.uint8) for _ in range(-(-rotated // size))]
            weight = qk.dequantize(qk.unpack_codes(copies[0], width, (out, inputs)), c).to(half)
            dense = [weight.clone() for _ in range(-(-rotated // (2 * weight.numel())))]
            for batch in batches:
                x = torch.randn(batch, inputs, device=device).to(half)
                args = (x, copies[0], c, None, width, [out, inputs])
                chosen = select("lut_linear", args)
                if chosen == "eager":
                    continue  # the reference writes the weight out: nothing to measure

                def kernel(packed: Tensor, given: tuple[Any, ...] = args) -> Tensor:
                    return torch.ops.qupedkern.lut_linear(given[0], packed, *given[2:])

                def matmul(weight: Tensor, x: Tensor = x) -> Tensor:
                    return torch.nn.functional.linear(x, weight)

                candidates = {
                    "kernel": _rotating(kernel, copies),
                    "bfloat16 matmul": _rotating(matmul, dense),
                }

                def check(args: Any = args, x: Tensor = x, weight: Tensor = weight) -> None:
                    got = torch.ops.qupedkern.lut_linear(*args)
                    _close(got, x.double() @ weight.double().t(), "lut_linear", 8e-3)

                moved = size + 2 * x.numel() + 2 * batch * out
                name = f"lut_linear {width} bits {out}x{inputs} batch {batch}"
                yield GpuCase("lut_linear", name, chosen, moved, candidates, check, 2.0 * batch * out * inputs)


def ceilings(device: str, numel: int, side: int) -> dict[str, tuple[Candidate, float]]:
    """copy and read in bytes a call, the bfloat16 matmul in operations a call; on random data, zeros run faster."""
    source, target = (torch.randn(numel, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    return {
        "copy": (lambda: target.copy_(source), 8.0 * numel),
        "read": (lambda: source.sum(), 4.0 * numel),
        "bfloat16 matmul": (lambda: a @ b, 2.0 * side**3),
    }
