"""The tables of `bench linear`, with the targets set for them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from .records import Case, Row
from .tables import Column, Key, Once, Table
from .targets import Target, at_least, at_most

_LAYERS = [f"{n} x {k}" for n, k in ((4096, 4096), (4096, 11008), (11008, 4096))]
_THREADS = ("1 thread", "2 threads")
_BITS = (1, 2, 3, 4)
Bounds = Mapping[str, Sequence[Target]]  # variant: a target for each number of bits


def _targets(
    dtype: str, bounds: Bounds, threads: Sequence[str] = _THREADS, bits: Sequence[int] = _BITS
) -> dict[Key, Target]:
    """The same targets for all layers."""
    return {
        (f"{layer}, {count}", dtype, batch, b): target
        for layer, count, (batch, targets) in product(_LAYERS, threads, bounds.items())
        for b, target in zip(bits, targets, strict=True)
    }


_LIMIT = _targets("float32", {"batch 1": at_most(1.8, 1.3, 1.15, 1.12)}, _THREADS[:1])
_LIMIT |= _targets("float32", {"batch 1": at_most(1.3, 1.3, 1.15, 1.12)}, _THREADS[1:])
_FLOAT32: Bounds = {
    "batch 1": at_least(40, 22, 16, 13),
    "batch 4": at_least(35, 19, 12, 10),
    "batch 16": at_least(10, 5.5, 4, 4),
    "batch 64": at_least(6, 3, 2.4, 2.4),
}
_BFLOAT16: Bounds = {
    "batch 1": at_least(10, 8, 6, 5),
    "batch 4": at_least(7, 7, 4.5, 4),
    "batch 16": at_least(2.7, 2.6, 2, 2),
    "batch 64": at_least(1.25, 1.25, 1.15, 1.15),
}
_NF4: Bounds = {f"batch {batch}": at_least(bound) for batch, bound in {1: 1.3, 4: 1.0, 16: 1.3, 64: 1.2}.items()}
_EQUAL = {
    key: target
    for dtype in ("float32", "bfloat16")
    for key, target in _targets(dtype, {batch: at_most(1, 1) for batch in _FLOAT32}, bits=(3, 4)).items()
}


class _Error(Once):
    """The largest error of the results, as a share of the largest result."""

    def value(self, case: Case) -> float | None:
        found = [row.quality[self.candidate] for row in case.rows if self.candidate in row.quality]
        return statistics.median(found) if found else None

    def _text(self, value: float) -> str:
        return f"{value:.0e}"


def _against_rivals(contender: str = "native") -> list[Column]:
    names = ("NF4", "torch int4", "torchao int4")
    return [Column(f"{name} / {contender}", name, contender) for name in names]


def _first(row: Row) -> bool:
    return (row.title, row.variant) == (f"{_LAYERS[0]}, 1 thread", "batch 1")


_HEADS: dict[str, Any] = {"tensors": "weight, out x in", "variant": "input", "level": "bits"}
_COLD = (
    "One center table for the whole weight. Weights are cold: every contender goes through 160 MiB of copies of its own. "
    "native: the kernel call, output given; layer: PackedLinear called as a module. limit: the packed bytes over the bandwidth "
    "of reading, measured in the same turns and threads."
)

TABLES = [
    Table(
        "Packed linear layers, float32",
        f"{_COLD} The rivals other than torch float32 compute in bfloat16. In brackets the targets.",
        [
            Column("native", "native"),
            Column("layer", "layer"),
            Column("native / limit", "native", "limit", _LIMIT),
            Column("torch float32 / native", "torch float32", "native", _targets("float32", _FLOAT32)),
            Column("torch float32 / layer", "torch float32", "layer"),
            Column("torch bfloat16 / native", "torch bfloat16", "native"),
            *_against_rivals(),
        ],
        of=lambda row: row.dtype == "float32",
        **_HEADS,
    ),
    Table(
        "Packed linear layers, bfloat16",
        f"{_COLD} In brackets the targets.",
        [
            Column("native", "native"),
            Column("layer", "layer"),
            Column("native / limit", "native", "limit"),
            Column("torch bfloat16 / native", "torch bfloat16", "native", _targets("bfloat16", _BFLOAT16)),
            Column("torch bfloat16 / layer", "torch bfloat16", "layer"),
            Column("NF4 / native", "NF4", "native", _targets("bfloat16", _NF4, bits=(4,))),
            *_against_rivals()[1:],
        ],
        of=lambda row: row.dtype == "bfloat16",
        **_HEADS,
    ),
    Table(
        "Packed linear layers, a table for each output channel",
        "The native call with one table of centers a row of the weight, beside that with one for all. In brackets the target.",
        [
            Column("per channel", "per channel"),
            Column("per channel / limit", "per channel", "limit"),
            Column("per channel / per tensor", "per channel", "native", _EQUAL),
            Column("torch float32 / per channel", "torch float32", "per channel"),
            Column("torch bfloat16 / per channel", "torch bfloat16", "per channel"),
        ],
        of=lambda row: row.m in (3, 4),
        **_HEADS,
    ),
    Table(
        "The rivals of packed linear layers",
        "Times a call. torchao intx holds a byte a weight and has no kernel here.",
        [
            *(Once(name, name) for name in ("torch float32", "torch bfloat16", "NF4", "torch int4", "torchao int4")),
            Column("torchao intx", "torchao intx"),
        ],
        **_HEADS,
    ),
    Table(
        "Errors of linear layers",
        "The largest error of a result from the product in float64, over the largest result, each contender with the weights it "
        "has: what computing in bfloat16 costs beside what quantizing costs.",
        [
            _Error(name, name)
            for name in (
                "native",
                "per channel",
                "layer",
                "torch float32",
                "torch bfloat16",
                "NF4",
                "torch int4",
                "torchao int4",
            )
        ],
        of=_first,
        **_HEADS,
    ),
]
