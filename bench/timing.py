"""Timing side by side: every candidate in the same process, in turns, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Candidate = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: 20th, 50th and 80th percentile over the rounds."""

    p20: float
    p50: float
    p80: float


def _calls_for(candidate: Candidate, least_seconds: float) -> int:
    started = time.perf_counter()
    candidate()
    once = time.perf_counter() - started
    return max(1, round(least_seconds / max(once, 1e-7)))


def interleaved(
    candidates: Mapping[str, Candidate], *, rounds: int = 15, least_seconds: float = 0.005
) -> dict[str, Timing]:
    """Time each candidate once a round, all in turns, so that what else the machine does falls on all alike.

    Each sample runs its candidate for at least least_seconds and counts the mean of those calls.
    """
    for candidate in candidates.values():  # first calls compile, allocate and load
        candidate()
        candidate()
    calls = {name: _calls_for(candidate, least_seconds) for name, candidate in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            started = time.perf_counter()
            for _ in range(calls[name]):
                candidate()
            samples[name].append(1e6 * (time.perf_counter() - started) / calls[name])
    return {name: _percentiles(values) for name, values in samples.items()}


def _percentiles(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(cuts[1], statistics.median(values), cuts[7])
