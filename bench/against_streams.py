"""What the tables of ops on weights share: every candidate and the machine's memory streams in turns, workload by workload."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from . import machine
from .records import Row
from .streams import Move, limits
from .timing import interleaved
from .workloads import Workload, workload


def timed(
    bench: str,
    work: Workload,
    m: int,
    candidates: Mapping[str, Callable[[], object]],
    moves: Sequence[Move],
    *,
    rounds: int,
    dtype: str = "float32",
    variant: str = "",
    moved: int | None = None,
) -> Row:
    """One row. The candidates have been checked; moves: what a call must read and write at least, which is the limit.

    moved: bytes of it, where they are not those of `moves` to the byte.
    """
    timings = interleaved({**candidates, **limits(work.threads, moves)}, rounds=rounds)
    return Row(
        bench=bench,
        name=work.name,
        title=work.title,
        m=m,
        dtype=dtype,
        variant=variant,
        bytes=sum(t.nbytes for sources, targets in moves for t in (*sources, *targets)) if moved is None else moved,
        time_us_p20_p50_p80={name: timing.rounded() for name, timing in timings.items()},
        machine=machine.description(),
    )


def each(
    names: Sequence[str], variants: Sequence[str], levels: Sequence[int], threads: int | None
) -> Iterator[tuple[Workload, str, int]]:
    """Every case of a table, workload by workload, each with its own number of threads unless one is asked for."""
    for name in names:
        for variant in variants:
            for m in levels:
                yield workload(name, threads), variant, m
