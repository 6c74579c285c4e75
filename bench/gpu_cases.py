"""What is timed on a GPU: every op on tensors of one size, by each backend that has a kernel for it, and by eager torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qupedkern import use_backend
from qupedkern.backends import EAGER, has_kernel, names, select, why_not
from qupedkern.ops import OPS

Candidate = Callable[[], object]


@dataclass(frozen=True)
class GpuCase:
    """candidates: what is timed, by name; "kernel", what a user gets, first. bytes and operations a call, 0 where they say nothing.

    check() raises where the kernel's output is wrong; it runs before anything is timed.
    """

    name: str
    backend: str
    bytes: float
    candidates: dict[str, Candidate]
    check: Callable[[], None]
    operations: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_close(got: Any, wanted: Any, what: str, tolerance: float) -> None:
    """AssertionError where the relative error of a tensor is past the tolerance, or not a number."""
    for one, other in zip(flat(got), flat(wanted), strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30)
        if not bool(error <= tolerance):
            raise AssertionError(f"{what}: relative error {float(error):.2g}, at most {tolerance:.2g} is right")


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for one in value for tensor in flat(one)]


def forced(backend: str, call: Candidate) -> Candidate:
    def run() -> object:
        with use_backend(backend):
            return call()

    return run


def by_backend(op: str, args: tuple[Any, ...], call: Candidate) -> tuple[str, dict[str, Candidate]]:
    """The backend that would run, and candidates: it first, then every other with a kernel that takes these arguments."""
    chosen = select(op, args)
    others = [name for name in names() if name not in (EAGER, chosen)]
    found = {"kernel": call}
    for name in others:
        if has_kernel(name, op) and why_not(name, op, args) is None:
            found[name] = forced(name, call)
    return chosen, found


def op_case(op: str, args: tuple[Any, ...], detail: str, moved: float, tolerance: float) -> GpuCase:
    call, reference = getattr(torch.ops.qupedkern, op), OPS[op].reference
    chosen, candidates = by_backend(op, args, lambda: call(*args))

    def check() -> None:
        wanted = reference(*args)
        for candidate in candidates.values():
            check_close(candidate(), wanted, f"{op} {detail}", tolerance)

    if chosen != EAGER:
        candidates["eager"] = lambda: reference(*args)
    return GpuCase(f"{op} {detail}", chosen, moved, candidates, check)


def _by_levels(device: str, numel: int, dtype: torch.dtype, m: int) -> Iterator[GpuCase]:
    """Ops on weights and a row of m centers."""
    size, close = dtype.itemsize, 2e-6 if dtype == torch.float32 else 8e-3
    sums = max(close, 1e-4)
    x, g = (torch.randn(numel, device=device).to(dtype) for _ in range(2))
    c = torch.linspace(-2, 2, m, device=device)
    P, t = torch.full((1,), 10 * (m - 1) / 4, device=device), torch.full((1,), 0.01, device=device)
    small = torch.full((1,), 1 / numel, device=device)
    detail, one = f"{short(dtype)} m={m}", torch.ones((), device=device)
    yield op_case("soft_quantize", (x, c, P), detail, 2 * size * numel, close)
    yield op_case("soft_quantize_backward", (g, x, c, P), detail, 3 * size * numel, sums)
    yield op_case("hard_quantize", (x, c, True), detail, 2 * size * numel, close)
    yield op_case("hard_quantize_backward", (g, x, c, True), detail, 3 * size * numel, sums)
    yield op_case("prox_weights", (x, c, t, "l1"), detail, 2 * size * numel, close)
    yield op_case("assign", (x, c), detail, (size + 1) * numel, 0.0)
    yield op_case("distance", (x, c, "l1"), detail, size * numel, sums)
    yield op_case("distance_backward", (one, x, c, "l1"), detail, 2 * size * numel, sums)
    for norm, method in (("l1", "exact"), ("l1", "counted"), ("l2", "exact")):
        args = (c, x, small, norm, method, None)
        yield op_case("prox_centers", args, f"{norm} {method} {detail}", size * numel, sums)
    codes = OPS["assign"].reference(x, c)
    yield op_case("dequantize", (codes, c.to(dtype)), detail, (size + 1) * numel, 0.0)
    yield op_case("dequantize_backward", (g, codes, c.to(dtype)), detail, (size + 1) * numel, sums)
    parts = [part.contiguous() for part in x.split(numel // 4)]
    rows, sharp = [c] * len(parts), [P] * len(parts)
    given = [part.contiguous() for part in g.split(numel // 4)]
    yield op_case("foreach_soft_quantize", (parts, rows, sharp), detail, 2 * size * numel, close)
    yield op_case("foreach_soft_quantize_backward", (given, parts, rows, sharp), detail, 3 * size * numel, sums)


def _by_bits(device: str, numel: int, bits: int) -> Iterator[GpuCase]:
    """Ops on codes as a bit stream."""
    detail, half = f"{bits} bits", torch.bfloat16
    codes = torch.randint(1 << bits, (numel,), device=device, dtype=torch.uint8)
    packed = OPS["pack_codes"].reference(codes, bits)
    stream = numel * bits / 8
    yield op_case("pack_codes", (codes, bits), detail, numel + stream, 0.0)
    yield op_case("unpack_codes", (packed, bits, [numel]), detail, numel + stream, 0.0)
    c = torch.randn(1 << bits, device=device).sort().values.to(half)
    yield op_case("dequantize_packed", (packed, c, bits, [numel]), f"{detail} bfloat16", 2 * numel + stream, 0.0)
    g = torch.randn(numel, device=device).to(half)
    args = (g, packed, c, bits, [numel])
    yield op_case("dequantize_packed_backward", args, f"{detail} bfloat16", 2 * numel + stream, 8e-3)
    width = 1024 if numel % 1024 == 0 else numel
    shape, many = [numel // width, width], max(numel // width // 4, 1)
    indices = torch.randint(shape[0], (many,), device=device)
    moved = many * width * (2 + bits / 8)
    yield op_case("packed_embedding", (indices, packed, c, bits, shape), f"{detail} bfloat16", moved, 0.0)
    g = g[: many * width].view(many, width)
    yield op_case("packed_embedding_backward", (g, indices, packed, c, bits, shape), f"{detail} bfloat16", moved, 8e-3)


def _small(device: str) -> Iterator[GpuCase]:
    """What its launches bound."""
    student, teacher = (torch.randn(256, 1000, device=device) for _ in range(2))
    moved, one = student.numel() * 8, torch.ones((), device=device)
    yield op_case("distillation_loss", (student, teacher, 2.0), "float32 256x1000", moved, 1e-5)
    statistics = OPS["distillation_loss"].reference(student, teacher, 2.0)[1]
    args = (one, student, teacher, 2.0, statistics)
    yield op_case("distillation_loss_backward", args, "float32 256x1000", 2 * moved, 1e-4)
    c = [torch.linspace(-1, 1, 4, device=device) for _ in range(20)]
    counts = [torch.randint(1000, (3, 4), device=device) for _ in c]
    zero, rate = [torch.zeros(1, device=device) for _ in c], torch.zeros(20, device=device)
    grads = [torch.zeros(4, device=device) for _ in c]
    step: tuple[Any, ...] = (c, grads, counts, [], zero, rate, "l1", "counted", 10.0)  # a rate of 0 keeps the centers
    chosen, candidates = by_backend("center_step", step, lambda: torch.ops.qupedkern.center_step(*step))
    yield GpuCase("center_step 20 tensors, m=4", chosen, 0.0, candidates, lambda: None)


def weight_steps(device: str, numel: int, levels: tuple[int, ...] = (2, 4, 16)) -> Iterator[GpuCase]:
    """quped_step on one float32 tensor: SGD with momentum and Adam, codes and counters in the pass. A rate of 0 keeps x."""
    for m in levels:
        for optimizer, moved in (("sgd", 21), ("adam", 29)):
            yield _weight_step(device, [numel], m, optimizer, f"m={m}", moved * numel)
    sizes = [432, *[2304] * 6, 4608, *[9216] * 5, 18432, *[36864] * 5, 640]  # ResNet-20's, all in the cache
    yield _weight_step(device, sizes if numel > 1 << 20 else sizes[:2], 4, "sgd", "m=4, ResNet-20", 0)


def _weight_step(device: str, sizes: list[int], m: int, optimizer: str, detail: str, moved: float) -> GpuCase:
    c, t = torch.linspace(-2, 2, m, device=device), torch.full((1,), 0.01, device=device)
    second = optimizer == "adam"

    def arguments(sizes: list[int]) -> tuple[Any, ...]:
        x, g, first = ([torch.randn(count, device=device) for count in sizes] for _ in range(3))
        numbers = (0.0, 0.0, 0.9, 0.999 if second else 0.0, 1e-8, False, 2, False, True, 0)
        state = [torch.rand(count, device=device) for count in sizes] if second else []
        each = len(sizes)
        return (x, g, [], first, state, [c] * each, [], [t] * each, "none", optimizer, "l1", *numbers)

    args = arguments(sizes)
    chosen, candidates = by_backend("quped_step", args, lambda: torch.ops.qupedkern.quped_step(*args))

    def check() -> None:
        mine = arguments([min(count, 1 << 16) for count in sizes])
        copies = [tuple([v.clone() for v in a] if isinstance(a, list) else a for a in mine) for _ in range(2)]
        got, wanted = torch.ops.qupedkern.quped_step(*copies[0]), OPS["quped_step"].reference(*copies[1])
        written = [[*copy[0], *copy[3]] for copy in copies]
        check_close([*flat(got), *written[0]], [*flat(wanted), *written[1]], "quped_step", 1e-4)

    if chosen != EAGER:
        candidates["eager"] = lambda: OPS["quped_step"].reference(*args)
    return GpuCase(f"quped_step {optimizer} {detail}", chosen, moved, candidates, check)


def single_tensors(
    device: str, numel: int, levels: tuple[int, ...] = (2, 4, 16), bits: tuple[int, ...] = (4, 2, 1, 3)
) -> Iterator[GpuCase]:
    """Each op on one tensor with one row of centers: float32 and bfloat16, and codes by bits."""
    for m in levels:
        for dtype in (torch.float32, torch.bfloat16):
            yield from _by_levels(device, numel, dtype, m)
    for width in bits:
        yield from _by_bits(device, numel, width)
    if bits:
        yield from _small(device)


def ceilings(device: str, numel: int, side: int) -> dict[str, tuple[Candidate, float]]:
    """copy and read in bytes a call, the bfloat16 matmul in operations a call; on random data, zeros run faster."""
    source, target = (torch.randn(numel, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    return {
        "copy": (lambda: target.copy_(source), 8.0 * numel),
        "read": (lambda: source.sum(), 4.0 * numel),
        "bfloat16 matmul": (lambda: a @ b, 2.0 * side**3),
    }
