"""A federated round of K clients: one after the other against stacked, on the GPU and on the processor.

Imported when its part begins: fl needs more packages than the kernels do.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from fl import Client, Federation, algorithms
from fl.core import Bits
from fl.data import ClientData, Part

from .gpu_clock import Clock
from .gpu_worker import Bench, Job

STEPS, SAMPLES, ROUNDS = 10, 64, 3  # local steps, images of a client; rounds, of which the first is not counted
SERIAL = 50  # clients of a serial round that is timed; a round of more would outlast the part
_SHAPE, _ARCHITECTURE = (1, 14, 14), "cnn1"


def _clients(count: int) -> list[Client]:
    draw = torch.Generator().manual_seed(0)

    def part(samples: int) -> Part:
        return Part(torch.randn(samples, *_SHAPE, generator=draw), torch.randint(10, (samples,), generator=draw))

    bits: Bits = 2
    held = [ClientData(tuple(range(10)), part(SAMPLES), part(8), part(16)) for _ in range(count)]
    return [Client(number, _ARCHITECTURE, bits, data) for number, data in enumerate(held)]


class _Enough(Exception):
    """The rounds that were wanted are done; what a run does at its end is not measured."""


def seconds_a_round(clock: Clock, engine: str, clients: list[Client], drawn: int) -> float:
    """Median of the rounds but the first, on the clock's device, with checkpoints and scores as any run has them.

    drawn: clients of a round.
    """
    stamps: list[float] = []

    def stamp(done: int, record: dict[str, Any]) -> None:
        clock.synchronize()
        stamps.append(time.perf_counter())
        if done == ROUNDS:
            raise _Enough

    with tempfile.TemporaryDirectory(prefix="bench-clients-") as directory:
        run = Federation(
            algorithm=algorithms.QuPeD(local_steps=STEPS), clients=clients, rounds=ROUNDS + 1,
            sample=drawn / len(clients), architecture=_ARCHITECTURE, engine=engine, device=str(clock.device),
        )  # fmt: skip
        with suppress(_Enough):
            run.run(f"{directory}/run", on_round=stamp)
    return statistics.median(after - before for before, after in itertools.pairwise(stamps[1:]))


def _measure(bench: Bench, clock: Clock, count: int, name: str) -> None:
    """One after the other, a round's time is its clients' together: at most SERIAL of them are timed, and what a round costs
    once is multiplied with them."""
    clients, serial = _clients(count), min(count, SERIAL)
    took = {
        "kernel": seconds_a_round(clock, "stacked", clients, count),
        "serial": seconds_a_round(clock, "serial", clients, serial) * count / serial,
    }
    ways = {
        "kernel": "wall clock",
        "serial": "wall clock" + (f", {serial} of {count} clients" if serial < count else ""),
    }
    times = {key: {"time_us": [round(1e6 * seconds, 1)] * 3, "way": ways[key]} for key, seconds in took.items()}
    bench.journal.write(
        "row", part="clients", name=name, backend="stacked", bytes=0, times=times,
        ratios={"serial": took["serial"] / took["kernel"]},
    )  # fmt: skip


def rounds(bench: Bench) -> Iterator[Job]:
    """The GPU's rows first, should time run out."""
    for count in bench.plan.clients if bench.clock.is_gpu else ():
        name = f"round of {count} clients, stacked"
        yield name, partial(_measure, clock=bench.clock, count=count, name=name)
    processor = Clock("cpu", flush_bytes=4) if bench.clock.is_gpu else bench.clock
    for count in bench.plan.clients:
        name = f"on the processor: round of {count} clients, stacked"
        yield name, partial(_measure, clock=processor, count=count, name=name)
