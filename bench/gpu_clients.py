"""A federated round of K clients: one after the other against stacked, where the federation computes (it takes no device).

Imported when its part begins: fl needs more packages than the kernels do.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fl import Client, Federation, algorithms
from fl.core import Bits
from fl.data import ClientData, Part

from .gpu_worker import Bench, Job

STEPS, SAMPLES, ROUNDS = 10, 64, 4  # local steps, images of a client; rounds, of which the first is not counted
_SHAPE, _ARCHITECTURE, _LEVELS = (1, 14, 14), "cnn1", (4,)


def _clients(count: int) -> list[Client]:
    draw = torch.Generator().manual_seed(0)

    def part(samples: int) -> Part:
        return Part(torch.randn(samples, *_SHAPE, generator=draw), torch.randint(10, (samples,), generator=draw))

    bits: Bits = 2
    held = [ClientData(tuple(range(10)), part(SAMPLES), part(8), part(16)) for _ in range(count)]
    return [Client(number, _ARCHITECTURE, bits, data) for number, data in enumerate(held)]


def seconds_a_round(engine: str, clients: list[Client]) -> float:
    """Median over the rounds but the first, with checkpoints and scores as any run has them."""
    stamps: list[float] = []

    def stamp(done: int, record: dict[str, Any]) -> None:
        stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory(prefix="bench-clients-") as directory:
        run = Federation(
            algorithm=algorithms.QuPeD(local_steps=STEPS), clients=clients, rounds=ROUNDS, sample=1.0,
            architecture=_ARCHITECTURE, engine=engine,
        )  # fmt: skip
        run.run(f"{directory}/run", on_round=stamp)
    return statistics.median(after - before for before, after in itertools.pairwise(stamps))


def _measure(bench: Bench, count: int) -> None:
    clients = _clients(count)
    took_us = {
        name: round(1e6 * seconds_a_round(engine, clients), 1)
        for name, engine in (("kernel", "stacked"), ("serial", "serial"))
    }
    times = {name: {"time_us": [us] * 3, "way": "wall clock"} for name, us in took_us.items()}
    ratios = {"serial": took_us["serial"] / took_us["kernel"]}
    bench.journal.write(
        "row", part="clients", name=f"round of {count} clients on the processor, stacked", backend="stacked", bytes=0,
        times=times, ratios=ratios,
    )  # fmt: skip


def rounds(bench: Bench) -> Iterator[Job]:
    for count in bench.plan.clients:
        yield f"round of {count} clients", partial(_measure, count=count)
    if bench.clock.is_gpu:
        yield "a round on the GPU", _on_the_gpu


def _on_the_gpu(bench: Bench) -> None:
    raise RuntimeError("the federation has no device to choose: its rounds run on the processor alone")
