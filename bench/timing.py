"""Timing side by side: every candidate in the same process, in turns, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Candidate = Callable[[], object]
SLOW = 0.2  # seconds; a call as long as this says enough in fewer samples
VERY_SLOW = 2.0
REST = 0.01  # seconds


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: 20th, 50th and 80th percentile over the rounds."""

    p20: float
    p50: float
    p80: float

    def rounded(self) -> list[float]:
        return [round(value, 2) for value in (self.p20, self.p50, self.p80)]


def _seconds(candidate: Candidate, calls: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        candidate()
    return (time.perf_counter() - started) / calls


def _settle(candidate: Candidate, once: float) -> None:
    """A start that owes nothing to the candidate before: OpenMP's threads spin on for some 3 ms after its call, on cores that
    others then miss, and once asleep they can take 8 ms to wake, which an untimed call of a quick candidate pays."""
    if torch.get_num_threads() > 1:
        time.sleep(REST)
        if once < SLOW:
            candidate()


def _plan(candidate: Candidate, rounds: int, least_seconds: float, slow: float) -> tuple[float, int, range]:
    """Seconds a call, calls a sample, and the rounds with a sample: all, or fewer of a slow candidate, spread over the run."""
    once = _seconds(candidate)  # the first call compiles, allocates and loads
    if once < VERY_SLOW:
        once = _seconds(candidate)
        if once < slow:
            once = _seconds(candidate)
    samples = rounds if once < slow else max(1, rounds // (3 if once < VERY_SLOW else 8))
    return once, max(1, round(least_seconds / max(once, 1e-7))), range(0, rounds, max(1, rounds // samples))


def interleaved(
    candidates: Mapping[str, Candidate], *, rounds: int = 15, least_seconds: float = 0.005, slow: float = SLOW
) -> dict[str, Timing]:
    """Time each candidate once a round, all in turns, so that what else the machine does falls on all alike.

    Each sample runs its candidate for at least least_seconds and counts the mean of those calls. A candidate that takes
    over `slow` seconds a call is sampled in every third round, one over VERY_SLOW in every eighth.
    """
    plans = {name: _plan(candidate, rounds, least_seconds, slow) for name, candidate in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name, candidate in candidates.items():
            once, calls, turns = plans[name]
            if turn in turns:
                _settle(candidate, once)
                samples[name].append(1e6 * _seconds(candidate, calls))
    return {name: percentiles(values) for name, values in samples.items()}


def percentiles(values: list[float]) -> Timing:
    """The 20th, 50th and 80th percentile of some microseconds."""
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(cuts[1], statistics.median(values), cuts[7])
