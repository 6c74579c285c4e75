"""Whole models with packed weights, end to end, beside their float selves: networks in cache, large layers, an embedding.

Where weights dominate, the speedup is held against what the kernels promise: the model's time with that of its F.linear calls
replaced by that of the native calls on the same inputs. Weights are cold there, for the model as for the kernels: calls go in turns
through so many copies of the packed model that none is in a cache when it comes round.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qupedkern as qk
from qupedkern.nn import PackedLinear
from qupedkern.ops import OPS

from . import machine
from .linear_contenders import copies
from .model_cases import CASES, products, weights_bytes
from .model_cases import Case as Model
from .native import available, native_call
from .records import Case, Row
from .tables import Column, Once, Table
from .targets import Target, at_most
from .timing import interleaved

NAMES = ("ResNet-20", "ResNet-32", "MLP 4 x 4096", "decoder block 2048", "embedding 32000 x 512")
QUICK = ("ResNet-8", "MLP 3 x 128", "embedding 500 x 64")
LEVELS = (1, 2, 4)  # bits
ROUNDS = 15
SLOW = 1.0  # seconds: a difference of 3 % needs all samples of a network that takes a third of one
LINEARS, KERNELS = "F.linear alone", "kernels alone"


def packed(model: nn.Module, bits: int) -> nn.Module:
    """A copy with every weight matrix packed. RuntimeError where a layer stays in float, and the time would not be its own."""
    made = nn.Sequential(copy.deepcopy(model))
    report = qk.quantize_weights_(made, bits=bits, init="linspace", rule=lambda name, layer: True)
    if report.left:
        raise RuntimeError(f"model: {next(iter(report.left))} is not packed: {next(iter(report.left.values()))}")
    return made.eval()


def check(name: str, made: nn.Module, x: Tensor) -> None:
    """RuntimeError unless a packed model gives what its unpacked weights give, to 1e-4 of the largest output."""
    plain = qk.unpack_(copy.deepcopy(made))
    with torch.no_grad():
        got, expected = made(x), plain(x)
    off = float((got - expected).abs().max() / expected.abs().max())
    if not off <= 1e-4:
        raise RuntimeError(f"{name}: off by {off:.2g} of the largest output, allowed are 1e-4")


def _in_turn(calls: Sequence[Callable[[], Any]], turns: Iterator[int] | None = None) -> Callable[[], Any]:
    """The calls one after the other. turns: which is next, shared by those that go through the same copies."""
    following = cycle(range(len(calls))) if turns is None else turns
    return lambda: calls[next(following)]()


def _all(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _kernels(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """The native calls of the model's linear layers, on the inputs they have in it, outputs allocated beforehand."""
    calls = []
    for layer, given in products(model, x):
        assert isinstance(layer, PackedLinear)
        arguments = (
            given,
            layer.packed,
            layer.centers.detach().float(),
            layer.bias,
            layer.bits,
            list(layer.weight_shape),
        )
        calls.append(native_call("lut_linear", arguments, (OPS["lut_linear"].allocate(*arguments),)))
    return _all(calls)


@torch.no_grad()
def measure(name: str, case: Model, levels: Sequence[int], *, threads: int, rounds: int) -> list[Row]:
    """One row for each number of bits, float and packed models in turns, each packed one checked first."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, inputs = case.build().eval(), case.inputs()
    calls = {"float": _in_turn([partial(model, x) for x in inputs])}
    sizes, dominated = {}, case.kind == "weights"
    for bits in levels:
        made = packed(model, bits)
        check(f"{name}, {bits} bits", made, inputs[0])
        sizes[bits] = weights_bytes(made)
        if not dominated:
            calls[f"packed @ {bits}"] = _in_turn([partial(made, x) for x in inputs])
            continue
        cold = [made, *(copy.deepcopy(made) for _ in range(copies(sizes[bits]) - 1))]
        turns = cycle(range(len(cold)))
        calls[f"packed @ {bits}"] = _in_turn([partial(one, inputs[0]) for one in cold], turns)
        if available("lut_linear"):
            calls[f"{KERNELS} @ {bits}"] = _in_turn([_kernels(one, inputs[0]) for one in cold], turns)
    if dominated:
        calls[LINEARS] = _all([partial(F.linear, x, m.weight, m.bias) for m, x in products(model, inputs[0])])
    timings = interleaved(calls, rounds=rounds, slow=SLOW)
    return [
        Row(
            bench="model",
            name=name,
            title=f"{name}, {case.batch}, {threads} thread{'s' if threads > 1 else ''}",
            m=bits,
            dtype="float32",
            variant=case.kind,
            bytes=sizes[bits],
            time_us_p20_p50_p80={
                key.split(" @")[0]: timing.rounded()
                for key, timing in timings.items()
                if "@" not in key or key.endswith(f"@ {bits}")
            },
            machine=machine.description(),
            quality={"weights": sizes[bits] / weights_bytes(model)},
        )
        for bits in levels
    ]


def rows(names: Sequence[str], levels: Sequence[int], *, rounds: int, threads: int | None, compiled: bool) -> list[Row]:
    """All rows of one process, with one thread and with two unless told. KeyError for an unknown model."""
    for name in names:
        if name not in CASES:
            raise KeyError(f"model: {name!r} is none of {', '.join(CASES)}")
    return [
        row
        for name in names
        for case in CASES[name]
        for count in ((threads,) if threads else (1, 2))
        for row in measure(name, case, levels, threads=count, rounds=rounds)
    ]


class _Share(Column):
    """Bytes of the packed weights over those of the float ones."""

    def value(self, case: Case) -> float | None:
        return case.first.quality.get(self.candidate)


def _promised(row: Row) -> float:
    """How many times as fast the model would be with the kernels in the place of its F.linear calls, all else as slow as it is."""
    return row.time_us("float") / (row.time_us("float") - row.time_us(LINEARS) + row.time_us(KERNELS))


class _OfPromise(Column):
    """What the kernels promise the whole model, or with over="packed" the share of it that the packed model keeps."""

    def value(self, case: Case) -> float | None:
        if not all(row.has(name) for row in case.rows for name in (KERNELS, LINEARS)):
            return None
        if self.over == "packed":
            return statistics.median(row.ratio("float", "packed") / _promised(row) for row in case.rows)
        return statistics.median(_promised(row) for row in case.rows)


_THREADS = ("1 thread", "2 threads")


def _targets(kind: str, titles: Sequence[str], target: Target, levels: Sequence[int] = LEVELS) -> dict[Any, Target]:
    return {
        (f"{title}, {count}", "float32", kind, bits): target
        for title in titles
        for count in _THREADS
        for bits in levels
    }


_NETWORKS = [f"ResNet-{depth}, batch " for depth in (20, 32)]
_END_TO_END = _targets("network", [f"{name}128" for name in _NETWORKS], Target(1.03, upper=True, slack=0.0))
_END_TO_END |= _targets("network", [f"{name}1" for name in _NETWORKS], Target(1.08, upper=True, slack=0.0))
_LARGE = [f"{name}, batch 1" for name in NAMES[2:4]]
_HEADS = {"tensors": "model", "level": "bits", "variant": ""}
_WEIGHTS = _Share("weights / float", "weights", percent=True)

TABLES = [
    Table(
        "Packed networks whose weights sit in cache",
        "float32, every convolution and linear layer packed, CIFAR shapes, inference. weights: bytes of codes and centers over "
        "those of the float weights. In brackets the targets, here without the usual 10 %.",
        [
            Once("float", "float"),
            Column("packed", "packed"),
            Column("packed / float", "packed", "float", _END_TO_END),
            _WEIGHTS,
        ],
        of=lambda row: row.variant == "network",
        **_HEADS,
    ),
    Table(
        "Packed models in which reading weights is the work",
        "float32. kernels: the model's F.linear calls over the native calls, both alone, on the inputs they have in the model. "
        "promised: what that would bring end to end, the rest of the model as slow as it is. "
        "Weights are cold: models and kernels go through 160 MiB of copies. In brackets the target, without the usual 10 %.",
        [
            Once("float", "float"),
            Column("packed", "packed"),
            Column("float / packed", "float", "packed"),
            Column("kernels", LINEARS, KERNELS),
            _OfPromise("promised", KERNELS, "float"),
            _OfPromise(
                "kept of it",
                KERNELS,
                "packed",
                targets=_targets("weights", _LARGE, Target(0.85, upper=False, slack=0.0)),
                percent=True,
            ),
            _WEIGHTS,
        ],
        of=lambda row: row.variant == "weights",
        **_HEADS,
    ),
    Table(
        "Packed embeddings",
        "float32, one center table, random tokens that go over the whole table. In brackets the target.",
        [
            Once("float", "float"),
            Column("packed", "packed"),
            Column(
                "packed / float",
                "packed",
                "float",
                _targets("embedding", [f"{NAMES[4]}, 1,000 tokens"], at_most(1)[0], levels=(4,)),
            ),
            _WEIGHTS,
        ],
        of=lambda row: row.variant == "embedding",
        **_HEADS,
    ),
]
