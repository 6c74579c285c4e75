"""Packed linear layers against the machine's read bandwidth, torch, and the 4-bit kernels a user could install instead.

Weights are cold, as in a model larger than the caches. limit: the packed bytes over the bandwidth of reading, which is
measured in the same turns and with the same threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from . import linear_rivals as rivals
from . import machine
from .linear_contenders import COLD_BYTES, DEVIATION, OP, Contender, Packed, error, float_linear
from .linear_picture import picture as picture
from .linear_tables import TABLES as TABLES
from .native import available
from .records import LIMIT, Row
from .streams import reads, scratch
from .timing import Timing, interleaved

SHAPES = {"4096x4096": (4096, 4096), "4096x11008": (4096, 11008), "11008x4096": (11008, 4096), "256x256": (256, 256)}
NAMES = ("4096x4096", "4096x11008", "11008x4096")  # weights [out, in], as torch has them
QUICK = ("256x256",)
LEVELS = (1, 2, 3, 4)  # bits
PER_CHANNEL = (3, 4)
OURS = ("native", "per channel", "layer")
BATCHES = (1, 4, 16, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = 5
SLOW = 0.03  # seconds; what takes as long is sampled in every third round, so that five processes take ten minutes
INTX = 4096 * 4096  # torchao's weight-only layers take a tenth of a second and more: timed once, at batch 1

Found = dict[str, Contender]  # by name; of ours, and of rivals that have each number of bits, by name and bits


def _of_bits(name: str, bits: int) -> str:
    return f"{name} @ {bits}"


@dataclass(frozen=True)
class Weights:
    """One shape's weights, in the copies of everyone, which serve both types of input; why rivals that are not here are not."""

    packed: tuple[Packed, ...]  # one for each number of bits
    others: Found
    absent: Mapping[str, str]

    @classmethod
    def drawn(cls, shape: tuple[int, int], levels: Sequence[int]) -> Weights:
        weight = DEVIATION * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        makers: dict[str, Callable[[], Contender]] = {
            "torch float32": lambda: float_linear(weight, torch.float32),
            "torch bfloat16": lambda: float_linear(weight, torch.bfloat16),
            "NF4": lambda: rivals.nf4(weight),
            **rivals.int4(weight),
        }
        if weight.numel() <= INTX:
            makers |= {_of_bits("torchao intx", b): lambda b=b: rivals.torchao_intx(weight, b) for b in levels}  # type: ignore[misc]
        others: Found = {}
        absent = {} if available(OP) else {"native": f"{OP} has no native kernel here"}
        for name, make in makers.items():
            try:
                others[name] = make()
            except (rivals.Unavailable, NotImplementedError) as why:
                absent[name.split(" @")[0]] = str(why)
        return cls(tuple(Packed.drawn(bits, shape) for bits in levels), others, absent)

    def contenders(self, dtype: torch.dtype) -> Found:
        """All that compete at one type of input: a float32 layer would only have its input cast for nothing."""
        float32_only = ("torch float32", "torchao intx")
        found = {
            name: other
            for name, other in self.others.items()
            if dtype == torch.float32 or not name.startswith(float32_only)
        }
        for packed in self.packed:
            ours = {"native": packed.native(dtype), "layer": packed.layer(dtype)}
            if packed.bits in PER_CHANNEL:
                ours["per channel"] = packed.native(dtype, per_channel=True)
            found |= {_of_bits(name, packed.bits): one for name, one in ours.items() if one is not None}
        return found


def checked(name: str, contender: Contender, x: Tensor, n: int) -> tuple[Callable[[], Tensor], float]:
    """The call to be timed, and the error of its result. RuntimeError where that is wrong, so that it gets no time."""
    calls = contender.calls(x)
    off = error(calls[0](), x, contender.rows, n)
    if not off <= contender.allowed:
        raise RuntimeError(
            f"linear: {name} is off by {off:.2g} of the largest result, allowed are {contender.allowed:g}"
        )
    return contender.in_turns(calls), off


@torch.no_grad()
def measure(
    name: str, dtype: str, batch: int, found: Found, absent: Mapping[str, str], *, threads: int, rounds: int
) -> list[Row]:
    """One row for each number of bits, all timed in turns, every contender checked first. The rivals stand in each row."""
    torch.set_num_threads(threads)
    (n, k), levels = SHAPES[name], sorted({int(key.split("@ ")[1]) for key in found if key.startswith("layer")})
    x = torch.randn(batch, k, generator=torch.Generator().manual_seed(batch)).to(DTYPES[dtype])
    competing = {key: one for key, one in found.items() if batch == 1 or not key.startswith("torchao intx")}
    calls, absent = {}, dict(absent)
    for key, one in competing.items():
        try:
            calls[key] = checked(key, one, x, n)
        except RuntimeError as why:
            if key.split(" @")[0] in OURS:
                raise
            absent[key.split(" @")[0]] = str(why)
    read = _read_bytes()
    timings = interleaved(
        {**{key: call for key, (call, _) in calls.items()}, **reads(threads, read)}, rounds=rounds, slow=SLOW
    )
    rows = []
    for bits in levels:
        here = {key.split(" @")[0]: key for key in timings if "@" not in key or key.endswith(f"@ {bits}")}
        share = n * k * bits / 8 / read.nbytes  # a reading limit is that of these bytes
        rows.append(
            Row(
                bench="linear",
                name=name,
                title=f"{n} x {k}, {threads} thread{'s' if threads > 1 else ''}",
                m=bits,
                dtype=dtype,
                variant=f"batch {batch}",
                bytes=-(-n * k * bits // 8),
                time_us_p20_p50_p80={
                    short: _scaled(timings[key], share if short.startswith(LIMIT) else 1.0).rounded()
                    for short, key in here.items()
                },
                machine=machine.description(),
                quality={short: calls[key][1] for short, key in here.items() if key in calls},
                remarks={short: found[key].remark for short, key in here.items() if key in found and found[key].remark}
                | {key: f"not timed: {why}" for key, why in absent.items()},
            )
        )
    return rows


@lru_cache(maxsize=1)
def _read_bytes() -> Tensor:
    """What the bandwidth of reading is measured on, no contender's."""
    return scratch(1, COLD_BYTES, torch.uint8)[0]


def _scaled(timing: Timing, by: float) -> Timing:
    return Timing(timing.p20 * by, timing.p50 * by, timing.p80 * by)


def rows(
    names: Sequence[str],
    levels: Sequence[int],
    *,
    rounds: int,
    threads: int | None,
    compiled: bool,
    batches: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
) -> list[Row]:
    """All rows of one process. KeyError for an unknown shape or type."""
    for given, known in ((names, SHAPES), (dtypes or (), DTYPES)):
        for name in given:
            if name not in known:
                raise KeyError(f"linear: {name!r} is none of {', '.join(known)}")
    measured = []
    for name in names:
        weights = Weights.drawn(SHAPES[name], levels)
        for dtype in dtypes or DTYPES:
            found = weights.contenders(DTYPES[dtype])
            for count, batch in product((threads,) if threads else (1, 2), batches or BATCHES):
                measured += measure(name, dtype, batch, found, weights.absent, threads=count, rounds=rounds)
    return measured
