"""Exact k-means of one tensor's weights, against scikit-learn's and our own reference: in time, and in squared error."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

import qupedkern as qk
from qupedkern.ops import OPS

from . import machine
from .native import available, native_call
from .records import Case, Row
from .tables import Column, Table
from .targets import Target
from .timing import interleaved

SIZES = {"30k": 30_000, "270k": 270_000, "1M": 1 << 20, "16M": 1 << 24}
NAMES = ("270k", "1M", "16M")
QUICK = ("30k",)
LEVELS = (4, 16)
SAMPLE = 100_000
EAGER_WORK = 1 << 23  # weights times centers: the reference takes a minute at 2^24
RESTARTS_WORK = 1 << 25  # as much for scikit-learn's ten starts


def _weights(name: str) -> Tensor:
    if name not in SIZES:
        raise KeyError(f"kmeans: tensors must be one of {', '.join(SIZES)}, got {name!r}")
    return 0.1 * torch.randn(SIZES[name], generator=torch.Generator().manual_seed(0))


def squared_error(x: Tensor, centers: Tensor) -> float:
    """Of the weights from their nearest centers, in float64."""
    gap = x.double() - qk.hard_quantize(x, centers).double()
    return float(gap.square().sum())


def _sklearn(x: Tensor, m: int, starts: int, threads: int) -> Callable[[], Tensor]:
    from sklearn.cluster import KMeans

    def run() -> Tensor:
        with threadpool_limits(limits=threads):
            fitted = KMeans(m, n_init=starts, random_state=0).fit(x.reshape(-1, 1).numpy())
        return torch.from_numpy(fitted.cluster_centers_).reshape(-1).float().sort().values

    return run


def _native(x: Tensor, m: int) -> Callable[[], Tensor]:
    arguments = OPS["init_centers"].prepare(x, m)
    output = OPS["init_centers"].allocate(*arguments)
    call = native_call("init_centers", arguments, (output,))

    def run() -> Tensor:
        call()
        return output

    return run


def _eager(x: Tensor, m: int) -> Tensor:
    with qk.use_backend("eager"):
        return qk.init_centers(x, m)


def _candidates(x: Tensor, m: int, threads: int) -> dict[str, Callable[[], Tensor]]:
    sample = x[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(1))[:SAMPLE]]
    found: dict[str, Callable[[], Tensor]] = {"native": _native(x, m)} if available("init_centers") else {}
    found["op"] = lambda: qk.init_centers(x, m)
    if x.numel() * m <= EAGER_WORK:
        found["eager"] = lambda: _eager(x, m)
    found["sklearn"] = _sklearn(x, m, 1, threads)
    if x.numel() * m <= RESTARTS_WORK:
        found["sklearn, 10 starts"] = _sklearn(x, m, 10, threads)
    found["sklearn, sample"] = _sklearn(sample, m, 1, threads)
    return found


def measure(name: str, m: int, *, threads: int, rounds: int) -> Row:
    """One row. RuntimeError where our centers are worse than a rival's, so that what is not optimal gets no time."""
    torch.set_num_threads(threads)
    x = _weights(name)
    candidates = _candidates(x, m, threads)
    found: dict[str, Tensor] = {}

    def kept(candidate: str) -> Callable[[], None]:
        def run() -> None:
            found[candidate] = candidates[candidate]()

        return run

    timed = {candidate: kept(candidate) for candidate in candidates}
    timings = interleaved({**timed, "torch.sort": lambda: torch.sort(x)}, rounds=rounds)
    errors = {candidate: squared_error(x, centers) for candidate, centers in found.items()}
    for candidate, error in errors.items():
        if not errors["op"] <= error * (1 + 1e-6):  # centers rounded to float32
            raise RuntimeError(f"kmeans: {candidate} has a smaller error than the optimum on {name}, m = {m}")
    return Row(
        bench="kmeans",
        name=name,
        title=f"{name}, {threads} thread{'s' if threads > 1 else ''}",
        m=m,
        dtype="float32",
        variant="normal",
        bytes=x.nbytes,
        time_us_p20_p50_p80={candidate: timing.rounded() for candidate, timing in timings.items()},
        machine=machine.description(),
        quality={candidate: error / errors["op"] for candidate, error in errors.items()},
    )


def rows(names: Sequence[str], levels: Sequence[int], *, rounds: int, threads: int | None, compiled: bool) -> list[Row]:
    """All rows of one process; one thread where none is asked for, which is what a row of weights uses anyway."""
    return [measure(name, m, threads=threads or 1, rounds=rounds) for name in names for m in levels]


class _Excess(Column):
    """By how much the squared error is above the optimum's, in percent."""

    def value(self, case: Case) -> float | None:
        found = [row.quality[self.candidate] for row in case.rows if self.candidate in row.quality]
        return statistics.median(found) if found else None

    def _text(self, value: float) -> str:
        return f"{max(100 * (value - 1), 0.0):.2g} %"


_DEADLINES = {
    ("16M, 1 thread", "float32", "normal", 16): Target(3e6, upper=True),
    ("270k, 1 thread", "float32", "normal", 4): Target(30e3, upper=True),
}

TABLES = [
    Table(
        "Exact k-means of a tensor's weights",
        "float32 weights, normal. native: the kernel call; op: the same through torch.ops; eager: our reference, the same program "
        "in numpy; sklearn: KMeans from one k-means++ start, from ten, and from one on 100,000 of the weights. excess: squared "
        "error above the optimum's. A dash: not run, for time. torch.sort is for scale. In brackets the target.",
        [
            Column("native", "native", targets=_DEADLINES),
            Column("op", "op"),
            Column("torch.sort", "torch.sort"),
            Column("eager / op", "eager", "op"),
            Column("sklearn / op", "sklearn", "op"),
            _Excess("excess", "sklearn"),
            Column("10 starts / op", "sklearn, 10 starts", "op"),
            _Excess("excess", "sklearn, 10 starts"),
            Column("sample / op", "sklearn, sample", "op"),
            _Excess("excess", "sklearn, sample"),
        ],
    )
]
