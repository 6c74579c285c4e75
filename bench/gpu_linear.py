"""lut_linear on the shapes of large models, against torch's bfloat16 product and, where they are installed, two packed rivals."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qupedkern import use_backend
from qupedkern.ops import OPS

from .gpu_cases import Candidate, GpuCase, by_backend, check_close
from .gpu_plan import Plan

HALF = torch.bfloat16
GROUP = 64  # weights a scale of the rivals
_CLOSE = 8e-3  # bfloat16's rounding of the result; cuBLAS may add in bfloat16, too


def _rotating(call: Callable[[Any], object], over: Sequence[Any]) -> Candidate:
    """One after another, so that weights come from memory and not from the cache."""
    turn = itertools.cycle(over)
    return lambda: call(next(turn))


def _copies(make: Callable[[], Any], size: float, rotated: int) -> list[Any]:
    return [make() for _ in range(max(1, -(-rotated // int(size))))]


def _bitsandbytes(weight: Tensor, bits: int, rotated: int) -> Callable[[Tensor], Candidate] | None:
    """NF4 in blocks of 64; 4 bits alone."""
    if bits != 4 or importlib.util.find_spec("bitsandbytes") is None:
        return None
    # Optional and without types.
    import bitsandbytes as bnb  # type: ignore[import-not-found,import-untyped,unused-ignore]

    def packed() -> Any:
        return bnb.functional.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")

    held = _copies(packed, weight.numel() / 2, rotated)
    return lambda x: _rotating(lambda one: bnb.matmul_4bit(x, one[0].t(), quant_state=one[1]), held)


def _gemlite(weight: Tensor, bits: int, rotated: int) -> Callable[[Tensor], Candidate] | None:
    """Affine codes in groups of 64: 1, 2 and 4 bits."""
    if bits not in (1, 2, 4) or importlib.util.find_spec("gemlite") is None:
        return None
    # Optional and without types.
    from gemlite.core import DType, GemLiteLinearTriton  # type: ignore[import-not-found,import-untyped,unused-ignore]

    out, inputs = weight.shape

    def packed() -> Any:
        layer = GemLiteLinearTriton(
            bits, group_size=GROUP, in_features=inputs, out_features=out, input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )  # fmt: skip
        codes = torch.randint(1 << bits, (out, inputs), device=weight.device, dtype=torch.uint8)
        scales = torch.rand(out, inputs // GROUP, device=weight.device, dtype=HALF)
        layer.pack(codes, scales, torch.zeros_like(scales), None)
        return layer

    held = _copies(packed, weight.numel() * bits / 8, rotated)
    return lambda x: _rotating(lambda layer: layer(x), held)


RIVALS = {"bitsandbytes NF4": _bitsandbytes, "gemlite": _gemlite}


def lut_linear(device: str, plan: Plan, fail: Callable[[str, Exception], None]) -> Iterator[GpuCase]:
    """Random codes and one table; then, of the first shape, tables by channel and float32. fail: told of a rival that does not
    start; one that is not installed is no failure."""
    for shape in plan.shapes:
        for bits in plan.bits:
            yield from _weight(device, plan, shape, bits, fail)
    batches = tuple(batch for batch in plan.batches if batch in (1, 16))
    for bits, tables, dtype in ((4, "channel", HALF), (4, "tensor", torch.float32), (2, "tensor", torch.float32)):
        if bits in plan.bits:
            yield from _variant(device, plan, bits, tables, dtype, batches or plan.batches[:1])


def _weight(
    device: str, plan: Plan, shape: tuple[int, int], bits: int, fail: Callable[[str, Exception], None]
) -> Iterator[GpuCase]:
    out, inputs = shape
    c = torch.randn(1 << bits, device=device).sort().values.to(HALF).float()
    size = out * inputs * bits // 8
    packed = _copies(lambda: torch.randint(256, (size,), device=device, dtype=torch.uint8), size, plan.rotated)
    weight = OPS["dequantize_packed"].reference(packed[0], c.to(HALF), bits, [out, inputs])
    dense = _copies(weight.clone, 2 * weight.numel(), plan.rotated)
    rivals = {}
    for name, start in RIVALS.items():
        try:
            rivals[name] = start(weight, bits, plan.rotated)
        except Exception as error:
            fail(f"lut_linear: {name}, {bits} bits", error)
    for batch in plan.batches:
        x = torch.randn(batch, inputs, device=device).to(HALF)
        given = {"bfloat16 matmul": _rotating(partial(torch.nn.functional.linear, x), dense)}
        given |= {name: rival(x) for name, rival in rivals.items() if rival is not None}
        yield _case((x, packed[0], c, None, bits, [out, inputs]), weight, packed, given, f"batch {batch}")


def _variant(
    device: str, plan: Plan, bits: int, tables: str, dtype: torch.dtype, batches: tuple[int, ...]
) -> Iterator[GpuCase]:
    out, inputs = plan.shapes[0]
    rows = (out,) if tables == "channel" else ()
    c = torch.randn(*rows, 1 << bits, device=device).sort().values.to(dtype).float()
    size = out * inputs * bits // 8
    packed = _copies(lambda: torch.randint(256, (size,), device=device, dtype=torch.uint8), size, plan.rotated)
    weight = OPS["dequantize_packed"].reference(packed[0], c, bits, [out, inputs]).to(dtype)
    for batch in batches:
        x = torch.randn(batch, inputs, device=device).to(dtype)
        given: dict[str, Candidate] = {f"{str(dtype)[6:]} matmul": partial(torch.nn.functional.linear, x, weight)}
        name = f"batch {batch}, {str(dtype)[6:]}, table a {tables}"
        yield _case((x, packed[0], c, None, bits, [out, inputs]), weight, packed, given, name)


def _case(
    args: tuple[Any, ...], weight: Tensor, packed: list[Tensor], rivals: dict[str, Candidate], detail: str
) -> GpuCase:
    x, first, c, _, bits, (out, inputs) = args
    turn = itertools.cycle(packed)

    def call() -> object:
        return torch.ops.qupedkern.lut_linear(x, next(turn), *args[2:])

    chosen, candidates = by_backend("lut_linear", args, call)

    def check() -> None:
        wanted = x.double() @ weight.double().t()
        for backend in (None, *(name for name in candidates if name != "kernel")):
            with use_backend(backend):
                got = torch.ops.qupedkern.lut_linear(*args)
            check_close(got, wanted, f"lut_linear {backend or ''}", _CLOSE if x.dtype == HALF else 1e-5)

    size = x.element_size()
    moved = first.numel() + size * (x.numel() + x.numel() // inputs * out) + c.numel() * 4
    name = f"lut_linear {bits} bits {out}x{inputs} {detail}"
    return GpuCase(name, chosen, moved, {**candidates, **rivals}, check, 2.0 * (x.numel() // inputs) * out * inputs)
