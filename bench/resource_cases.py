"""The calls whose kernels bench/resources.py compiles: every op with Triton kernels, on tensors without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SIDE = 4096  # of a linear layer
_N, _RAGGED = 1 << 24, (1 << 24) + 5  # rows of 2^24 / G weights; a single one has no length that helps


@dataclass(frozen=True)
class Case:
    """A call. loaded, stored: bytes an element of a tile that the first kernel launched must read and write 16 at a time;
    tables of centers not counted. packed: its stream must be read so too, whatever a tile is.

    Where a kernel moves most of its bytes in one direction, that is the one that counts.
    """

    op: str
    dtype: torch.dtype
    m: int
    loaded: float
    groups: int = 1
    bits: int = 0
    variant: str = ""  # of quped_step: its optimizer; of prox_centers: its norm and method
    stored: float = 0
    packed: bool = False
    chunk: int = 16  # bytes of a stream that belong together: a thread with fewer has no wide load to make

    @property
    def name(self) -> str:
        rows = "" if self.groups == 1 else f", {self.groups} rows"
        dtype = str(self.dtype).removeprefix("torch.")
        what = f"{dtype} {self.bits} bits{rows}" if self.bits else f"{dtype} m={self.m}{rows}"
        return f"{self.op} {what} {self.variant}".rstrip()


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(case: Case) -> tuple[Any, ...]:
    if case.bits:
        return _packed_arguments(case)
    if case.op.startswith("distillation"):
        logits = _empty(128, case.m, dtype=case.dtype)
        given = (logits, logits, 2.0)
        return (_empty(), *given, _empty(128, 5)) if case.op.endswith("backward") else given
    groups, n = _cut(case)
    x, c, one = _empty(n, dtype=case.dtype), _empty(*groups, case.m), _empty(1)
    codes = _empty(n, dtype=torch.uint8)
    if case.op == "quped_step":  # SGD with momentum beside the soft quantizer's gradient, Adam without
        chain, options = ("soft", (0.9, 0.0)) if case.variant == "sgd" else ("none", (0.9, 0.999))
        soft = chain == "soft"
        tensors = ([x], [x], [x] if soft else [], [x], [] if soft else [x], [c], [one] if soft else [], [one])
        return (*tensors, chain, case.variant, "l1", 0.1, 1e-4, *options, 1e-8, False, 2, False, True, 0)
    return {
        "assign": (x, c),
        "center_step": ([c], [c], [_empty(3, case.m, dtype=torch.int64)], [], [one], one, "l1", "counted", 10.0),
        "dequantize": (codes, c.to(case.dtype)),
        "dequantize_backward": (x, codes, c.to(case.dtype)),
        "distance": (x, c, "l1"),
        "distance_backward": (_empty(), x, c, "l1"),
        "foreach_soft_quantize": ([x] * 3, [c] * 3, [one] * 3),
        "foreach_soft_quantize_backward": ([x] * 3, [x] * 3, [c] * 3, [one] * 3),
        "hard_quantize": (x, c, True),
        "hard_quantize_backward": (x, x, c, True),
        "prox_centers": (c, x, one, *(case.variant.split() or ("l1", "exact")), None),
        "prox_weights": (x, c, one, "l1"),
        "soft_quantize": (x, c, one),
        "soft_quantize_backward": (x, x, c, one),
    }[case.op]


def _cut(case: Case) -> tuple[tuple[int, ...], int]:
    """The leading sizes of the centers, and the number of weights."""
    return ((case.groups,), _N) if case.groups > 1 else ((), _RAGGED)


def _packed_arguments(case: Case) -> tuple[Any, ...]:
    groups, n = _cut(case)
    bits, size, dtype = case.bits, [_SIDE, _SIDE], case.dtype
    stream, table = _empty(-(-n * bits // 8), dtype=torch.uint8), _empty(*groups, case.m)
    square = _empty(_SIDE * _SIDE * bits // 8, dtype=torch.uint8)
    rows, tokens = _empty(16, _SIDE, dtype=dtype), _empty(4096, dtype=torch.int64)
    embedding = (tokens, square, table.to(dtype), bits, size)
    linear = (rows, square, table, _empty(_SIDE), bits, size)
    return {
        "dequantize_packed": (stream, table.to(dtype), bits, [n]),
        "dequantize_packed_backward": (_empty(n, dtype=dtype), stream, table.to(dtype), bits, [n]),
        "lut_linear": linear,
        "lut_linear_backward": (rows, *linear),
        "pack_codes": (_empty(n, dtype=torch.uint8), bits),
        "packed_embedding": embedding,
        "packed_embedding_backward": (_empty(4096, _SIDE, dtype=dtype), *embedding),
        "unpack_codes": (stream, bits, [n]),
    }[case.op]


_MANY = ("assign", "hard_quantize_backward", "soft_quantize", "soft_quantize_backward")  # also for 256 centers


def cases() -> list[Case]:
    """Every op with kernels: float32 by number of centers and with rows, bfloat16, codes by bits, steps by optimizer."""
    found = []
    for dtype, levels in ((torch.float32, (2, 4, 16)), (torch.bfloat16, (4,))):
        size = dtype.itemsize
        loaded = {"assign": size, "dequantize": 1, "dequantize_backward": size + 1, "distance": size}
        loaded |= {"distance_backward": size, "hard_quantize": size, "hard_quantize_backward": 2 * size}
        loaded |= {"prox_weights": size, "soft_quantize": size, "soft_quantize_backward": 2 * size}
        loaded |= {"foreach_soft_quantize": size, "foreach_soft_quantize_backward": 2 * size}
        written = dict.fromkeys(("dequantize", "hard_quantize", "prox_weights", "soft_quantize"), size)
        found += [Case(op, dtype, m, wide, stored=written.get(op, 0)) for op, wide in loaded.items() for m in levels]
        found += [Case("prox_centers", dtype, m, size, variant="l1 exact") for m in levels]
    for op in _MANY:
        found.append(Case(op, torch.float32, 256, 8 if op.endswith("backward") else 4))
    for op in _MANY[2:]:
        found.append(Case(op, torch.float32, 4, 8 if op.endswith("backward") else 4, groups=64))
    for bits, dtype in ((2, torch.float32), (3, torch.bfloat16), (4, torch.bfloat16)):
        for op in ("packed_embedding", "packed_embedding_backward"):
            found.append(Case(op, dtype, 1 << bits, 0, bits=bits))
        found.append(Case("dequantize_packed", dtype, 1 << bits, 0, bits=bits, stored=dtype.itemsize))
        found.append(Case("dequantize_packed_backward", dtype, 1 << bits, dtype.itemsize, bits=bits))
    found += [Case("prox_centers", torch.float32, 4, 4, variant=how) for how in ("l1 counted", "l2 exact")]
    half = torch.bfloat16
    for bits in (1, 2, 3, 4):
        found.append(Case("lut_linear", half, max(1 << bits, 2), 0, bits=bits, packed=bits in (2, 4)))
    found += [Case(op, half, 16, 0, bits=4, groups=_SIDE) for op in ("lut_linear", "lut_linear_backward")]
    found += [Case("lut_linear", dtype, 16, 0, bits=4) for dtype in (torch.float16, torch.float32)]
    found += [Case("lut_linear_backward", dtype, 16, 0, bits=4) for dtype in (half, torch.float32)]
    for bits in range(1, 9):
        found += [Case("pack_codes", torch.uint8, 2, 1, bits=bits)]
        found += [
            Case("unpack_codes", torch.uint8, 2, bits / 8, bits=bits, stored=1, chunk=16 * (bits if 8 % bits else 1))
        ]
    for m in (2, 4, 16):
        found += [
            Case("quped_step", torch.float32, m, 16, variant="sgd"),
            Case("quped_step", torch.float32, m, 16, variant="adam"),
        ]
    found.append(Case("center_step", torch.float32, 16, 0))
    found += [Case(op, torch.bfloat16, 1000, 0) for op in ("distillation_loss", "distillation_loss_backward")]
    return found
