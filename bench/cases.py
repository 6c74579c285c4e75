"""What is timed: each op on named shapes, the bytes it must move, and how its result is checked first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import qupedkern as qk
from qupedkern.ops import OPS

SHAPES = {
    "1M": (1024, 1024),  # fits the last-level cache: no page faults, no memory bus
    "resnet20-layer3": (64, 64, 3, 3),
    "16M": (4096, 4096),
}
SHARPNESS = 10.0  # in 1/gap, what training uses


@dataclass(frozen=True)
class Case:
    """One op on one shape. names: torch ops to run in order; bytes: what they must read and write at least."""

    op: str
    shape: str
    m: int
    names: tuple[str, ...]
    args: tuple[tuple[Any, ...], ...]
    bytes: int

    def run(self) -> Tensor | tuple[Tensor, ...]:
        for name, args in zip(self.names, self.args, strict=True):
            result = getattr(torch.ops.qupedkern, name)(*args)
        return result

    def references(self) -> list[Callable[[], Any]]:
        """The same computation by the ops' references: what torch.compile gets to work on."""
        return [lambda n=n, a=a: OPS[n].reference(*a) for n, a in zip(self.names, self.args, strict=True)]


def _inputs(shape: str, m: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 0.1 * torch.randn(SHAPES[shape], generator=generator)
    centers = qk.init_centers(x.flatten()[:20000], m, method="quantile")
    sharpness = torch.tensor([SHARPNESS]) / qk.nn.row_gaps(centers)
    grad = torch.randn(SHAPES[shape], generator=generator)
    return x, centers, sharpness, grad


def build(op: str, shape: str, m: int) -> Case:
    """The case of that name. Raises KeyError for an unknown op."""
    x, c, P, g = _inputs(shape, m)
    n, codes, bits = x.numel(), qk.assign(x, c), (m - 1).bit_length()
    packed = qk.pack_codes(codes, bits)
    strength = torch.tensor([0.01])
    table: dict[str, tuple[tuple[str, ...], tuple[tuple[Any, ...], ...], int]] = {
        "soft_quantize": (("soft_quantize",), ((x, c, P),), 8 * n),
        "soft_quantize_backward": (("soft_quantize_backward",), ((g, x, c, P),), 12 * n),
        "soft_quantize+backward": (("soft_quantize", "soft_quantize_backward"), ((x, c, P), (g, x, c, P)), 20 * n),
        "hard_quantize+backward": (
            ("hard_quantize", "hard_quantize_backward"),
            ((x, c, True), (g, x, c, True)),
            20 * n,
        ),
        "assign": (("assign",), ((x, c),), 5 * n),
        "dequantize": (("dequantize",), ((codes, c),), 5 * n),
        "prox_weights": (("prox_weights",), ((x, c, strength, "l1"),), 8 * n),
        "pack_codes": (("pack_codes",), ((codes, bits),), n + packed.numel()),
        "unpack_codes": (("unpack_codes",), ((packed, bits, list(x.shape)),), n + packed.numel()),
    }
    names, args, moved = table[op]
    return Case(op, shape, m, names, args, moved)


OP_NAMES = (
    "soft_quantize",
    "soft_quantize_backward",
    "soft_quantize+backward",
    "hard_quantize+backward",
    "assign",
    "dequantize",
    "prox_weights",
    "pack_codes",
    "unpack_codes",
)
