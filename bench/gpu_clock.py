"""Timing on a device: events around each call, a cold cache before it, medians. On the CPU the same with the processor's clock.

The last is a stand-in: it lets the tests run every line of the measuring code on a machine without a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .timing import Timing, percentiles

Candidate = Callable[[], object]
FLUSH_BYTES = 256 * 2**20  # several times the largest L2
SHORT = 30.0  # microseconds: below, a call is timed inside a graph of many
GRAPH_CALLS = 20


@dataclass(frozen=True)
class Measured:
    """Microseconds a call. way: events, or graph where the call was repeated in a captured graph."""

    timing: Timing
    way: str


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str, flush_bytes: int = FLUSH_BYTES) -> None:
        self.device = torch.device(device)
        self.is_gpu = self.device.type == "cuda"
        self._flush = torch.ones(flush_bytes // 4, device=self.device)

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Fill the cache by reading: lines written would be charged to the next kernel when they are evicted."""
        self._flush.sum()

    def wake(self, seconds: float = 0.3) -> None:
        """Work until the clocks are up."""
        a = torch.randn((2048, 2048) if self.is_gpu else (64, 64), device=self.device)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            a @ a
            self.synchronize()

    def samples(self, candidate: Candidate, rounds: int) -> list[float]:
        """Microseconds of each of `rounds` calls, the cache cold before each."""
        if not self.is_gpu:
            found = []
            for _ in range(rounds):
                self.flush()
                started = time.perf_counter()
                candidate()
                found.append(1e6 * (time.perf_counter() - started))
            return found
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
        for begin, end in pairs:
            self.flush()
            begin.record()
            candidate()
            end.record()
        self.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs]

    def graph(self, candidate: Candidate, calls: int = GRAPH_CALLS) -> Candidate:
        """A replay of `calls` calls. RuntimeError where they cannot be captured."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            candidate()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                candidate()
        return graph.replay

    def time(self, candidate: Candidate, rounds: int = 20) -> Measured:
        """Median and spread; the first calls compile and are not counted. Short calls go into a graph where they can."""
        for _ in range(3):
            candidate()
        self.synchronize()
        found = self.samples(candidate, rounds)
        if self.is_gpu and statistics.median(found) < SHORT:
            try:
                replay = self.graph(candidate)
            except RuntimeError:  # what waits for the device cannot be captured
                return Measured(percentiles(found), "events")
            replay()
            return Measured(percentiles([value / GRAPH_CALLS for value in self.samples(replay, rounds)]), "graph")
        return Measured(percentiles(found), "events")
