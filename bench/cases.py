"""The ops that `bench ops` times: what each is called with, and the bytes it must read and write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import qupedkern as qk
from qupedkern.ops import OPS

from .native import available, native_call
from .workloads import Workload, tensors

STRENGTH = 0.01
Call = tuple[str, tuple[Any, ...]]  # an op and its arguments


@dataclass(frozen=True)
class Case:
    """Ops run in order on one tensor. bytes: what they must read and write at least."""

    op: str
    calls: tuple[Call, ...]
    bytes: int

    def run(self) -> list[Any]:
        """Through torch.ops, by the backend that is chosen; what each call returns."""
        return [getattr(torch.ops.qupedkern, name)(*args) for name, args in self.calls]

    def reference(self) -> list[Any]:
        """The same by the ops' references, the formula in eager PyTorch: what torch.compile gets to work on."""
        return [OPS[name].reference(*args) for name, args in self.calls]

    def native(self) -> Callable[[], list[Any]] | None:
        """The kernel calls on outputs allocated beforehand; None where an op has no kernel here."""
        if not all(available(name) for name, _ in self.calls):
            return None
        results = [OPS[name].allocate(*args) for name, args in self.calls]
        kernels = [
            native_call(name, args, result if isinstance(result, tuple) else (result,))
            for (name, args), result in zip(self.calls, results, strict=True)
        ]

        def run() -> list[Any]:
            for kernel in kernels:
                kernel()
            return results

        return run


def _table(work: Workload, m: int) -> dict[str, tuple[tuple[Call, ...], float]]:
    """Op -> its calls, and bytes a weight."""
    case = tensors(work, m)
    x, c, P, g = case.xs[0], case.centers[0], case.sharpness[0], case.grads[0]
    codes, bits = qk.assign(x, c), (m - 1).bit_length()
    packed, strength = qk.pack_codes(codes, bits), torch.tensor([STRENGTH])
    matrix = [len(x), x.numel() // len(x)]
    each_row = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    moved = c + 0.1 * c.diff().min()

    def centers(method: str) -> tuple[tuple[Call, ...], float]:
        return (("prox_centers", (moved, x, strength, "l1", method, c)),), 4

    return {
        "soft_quantize": ((("soft_quantize", (x, c, P)),), 8),
        "soft_quantize_backward": ((("soft_quantize_backward", (g, x, c, P)),), 12),
        "hard_quantize + backward": (
            (("hard_quantize", (x, c, True)), ("hard_quantize_backward", (g, x, c, True))),
            20,
        ),
        "assign": ((("assign", (x, c)),), 5),
        "dequantize": ((("dequantize", (codes, c)),), 5),
        "dequantize_backward": ((("dequantize_backward", (g, codes, c)),), 5),
        "distance": ((("distance", (x, c, "l1")),), 4),
        "prox_weights": ((("prox_weights", (x, c, strength, "l1")),), 8),
        "prox_centers, counted": centers("counted"),
        "prox_centers, exact": centers("exact"),
        "pack_codes": ((("pack_codes", (codes, bits)),), 1 + bits / 8),
        "unpack_codes": ((("unpack_codes", (packed, bits, list(x.shape))),), 1 + bits / 8),
        "dequantize_packed": ((("dequantize_packed", (packed, c, bits, matrix)),), 4 + bits / 8),
        "packed_embedding": (
            (("packed_embedding", (each_row, packed, c, bits, matrix)),),
            4 + bits / 8 + 8 / matrix[1],
        ),
    }


OP_NAMES = (
    "soft_quantize",
    "soft_quantize_backward",
    "hard_quantize + backward",
    "assign",
    "dequantize",
    "dequantize_backward",
    "distance",
    "prox_weights",
    "prox_centers, counted",
    "prox_centers, exact",
    "pack_codes",
    "unpack_codes",
    "dequantize_packed",
    "packed_embedding",
)


def build(op: str, work: Workload, m: int) -> Case:
    """The case of that name. Raises KeyError for an unknown op."""
    table = _table(work, m)
    if op not in table:
        raise KeyError(f"op must be one of {'; '.join(table)}, got {op!r}")
    calls, bytes_a_weight = table[op]
    return Case(op, calls, round(bytes_a_weight * work.numel))


def flat(values: Any) -> list[Tensor]:
    """The tensors of nested lists and tuples, in order."""
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in flat(value)]
