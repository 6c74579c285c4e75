"""quped_step: the whole weight update in one pass, against the machine's limit and three rivals.

The limit reads and writes what a step must: x, gradient and state read, x and state written in place: 3 + 2 streams for SGD
with momentum, 4 + 3 for Adam. The codes, one byte a weight, are left out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qupedkern.ops import OPS

from . import machine, rivals
from .native import available, native_call
from .records import Row
from .streams import limits, scratch
from .tables import Column, Table
from .targets import Target, at_least, at_most
from .timing import interleaved
from .workloads import Tensors, Workload, tensors, workload

NAMES = ("1M", "16M")
QUICK = ("64k",)
LEVELS = (2, 4, 16)
STRENGTH = 1e-6
# So small a rate that thousands of repeated steps leave the weights where they are; the work does not depend on it.
SGD = {"lr": 1e-6, "weight_decay": 1e-4, "momentum": 0.9}
ADAM = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8}
REPEATED_GIB = 1.0  # the published procedure is not timed where its weights, repeated m times, take as much


@dataclass
class State:
    """One candidate's own x, gradient and optimizer state, all of it after step 1, and the codebook they share."""

    x: Tensor
    grad: Tensor
    first: Tensor
    second: Tensor
    centers: Tensor
    strength: Tensor

    @classmethod
    def of(cls, case: Tensors) -> State:
        x, grad = case.xs[0].clone(), 1e-3 * case.grads[0]
        return cls(x, grad, grad.clone(), grad * grad, case.centers[0], torch.tensor([STRENGTH]))

    def kept(self, optimizer: str) -> list[Tensor]:
        """What a step writes, by which rivals are compared."""
        return [self.x, self.first] if optimizer == "SGD" else [self.x, self.first, self.second]


def _arguments(state: State, optimizer: str) -> tuple[Any, ...]:
    """Arguments of the op for the second step: momentum and moments are there."""
    adam = optimizer == "Adam"
    if adam:
        numbers = (ADAM["lr"], 0.0, *ADAM["betas"], ADAM["eps"])  # type: ignore[misc]
    else:
        numbers = (SGD["lr"], SGD["weight_decay"], SGD["momentum"], 0.0, 0.0)
    lists = (
        [state.x],
        [state.grad],
        [],
        [state.first],
        [state.second] if adam else [],
        [state.centers],
        [],
        [state.strength],
    )
    return (*lists, "none", optimizer.lower(), "l1", *numbers, False, 2, False, True, 0)


def _op(state: State, optimizer: str) -> Callable[[], rivals.Moved]:
    arguments = _arguments(state, optimizer)

    def run() -> rivals.Moved:
        _, counts, _, distance, codes = torch.ops.qupedkern.quped_step(*arguments)
        return state.x, codes[0], counts[0], distance[0]

    return run


def _native(state: State, optimizer: str) -> Callable[[], rivals.Moved]:
    arguments = _arguments(state, optimizer)
    outputs = OPS["quped_step"].allocate(*arguments)
    _, counts, _, distance, codes = outputs
    call = native_call("quped_step", arguments, outputs)

    def run() -> rivals.Moved:
        call()
        return state.x, codes[0], counts[0], distance[0]

    return run


def _rival(state: State, optimizer: str, prox: Callable[..., rivals.Moved]) -> Callable[[], rivals.Moved]:
    """A step of torch's own optimizer, foreach, then a rival's prox with codes, counts and R, written back to x."""
    weight = torch.nn.Parameter(state.x)
    weight.grad = state.grad
    if optimizer == "SGD":
        inner: torch.optim.Optimizer = torch.optim.SGD([weight], **SGD, foreach=True)  # type: ignore[arg-type]
        inner.state[weight] = {"momentum_buffer": state.first}
    else:
        inner = torch.optim.Adam([weight], **ADAM, foreach=True)  # type: ignore[arg-type]
        inner.state[weight] = {"step": torch.tensor(1.0), "exp_avg": state.first, "exp_avg_sq": state.second}

    def run() -> rivals.Moved:
        inner.step()
        moved, codes, counts, distance = prox(state.x, state.centers, state.strength)
        state.x.copy_(moved)
        return state.x, codes, counts, distance

    return run


def check(name: str, got: rivals.Moved, kept: Sequence[Tensor], expected: rivals.Moved, true: Sequence[Tensor]) -> None:
    """RuntimeError unless a step left the same weights and state, codes, counts and R, so that a wrong one gets no time.

    Allowed: 2 ulp of the largest value in weights and state (rivals round the prox otherwise), hence one code and count in
    10^5, where the weight is as near to a midpoint, and 1e-4 of R, which rivals sum in one go.
    """
    for part, a, b in zip(("x", "first", "second"), kept, true, strict=False):
        if not float((a - b).abs().max()) <= 2.4e-7 * float(b.abs().max()):
            raise RuntimeError(f"{name}: {part} disagrees with the reference")
    room = 1 + expected[1].numel() // 100_000
    if not int((got[1] != expected[1]).sum()) <= room:
        raise RuntimeError(f"{name}: codes disagree with the reference")
    # members are as codes; how many lie above and below also turns on the last bit of weights on their centers
    if not int((got[2][0].flatten() - expected[2][0].flatten()).abs().max()) <= room:
        raise RuntimeError(f"{name}: members disagree with the reference")
    if not int((got[2] - expected[2]).abs().max()) <= room + expected[1].numel() // 1000:
        raise RuntimeError(f"{name}: members above or below disagree with the reference")
    if not float((got[3] - expected[3]).abs()) <= 1e-4 * float(expected[3]):
        raise RuntimeError(f"{name}: R disagrees with the reference")


def _candidates(case: Tensors, optimizer: str, m: int) -> dict[str, tuple[State, Callable[[], rivals.Moved]]]:
    def made(build: Callable[..., Callable[[], rivals.Moved]], *more: Any) -> tuple[State, Callable[[], rivals.Moved]]:
        state = State.of(case)
        return state, build(state, optimizer, *more)

    found = {
        **({"native": made(_native)} if available("quped_step") else {}),
        "op": made(_op),
        "eager": made(_rival, rivals.prox_by_ops),
        "lean eager": made(_rival, rivals.prox_lean),
    }
    if m * case.xs[0].nbytes < REPEATED_GIB * 2**30:
        found["published"] = made(_rival, rivals.prox_published)
    return found


def measure(work: Workload, m: int, optimizer: str, *, rounds: int) -> Row:
    """One row, every candidate's first step checked before it is timed."""
    torch.set_num_threads(work.threads)
    case = tensors(work, m)
    right = State.of(case)
    _, counts, _, distance, codes = OPS["quped_step"].reference(*_arguments(right, optimizer))
    expected = (right.x, codes[0], counts[0], distance[0])
    candidates = _candidates(case, optimizer, m)
    for name, (state, run) in candidates.items():
        check(name, run(), state.kept(optimizer), expected, right.kept(optimizer))
    streams = scratch(3 if optimizer == "SGD" else 4, work.numel)
    written = [streams[0], *streams[2:]]  # all but the gradient
    timings = interleaved(
        {**{name: run for name, (_, run) in candidates.items()}, **limits(work.threads, [(streams, written)])},
        rounds=rounds,
    )
    return Row(
        bench="step",
        name=work.name,
        title=work.title,
        m=m,
        dtype="float32",
        variant=optimizer,
        bytes=sum(t.nbytes for t in (*streams, *written)),
        time_us_p20_p50_p80={name: timing.rounded() for name, timing in timings.items()},
        machine=machine.description(),
    )


def rows(names: Sequence[str], levels: Sequence[int], *, rounds: int, threads: int | None, compiled: bool) -> list[Row]:
    """All rows of one process."""
    return [
        measure(workload(name, threads), m, optimizer, rounds=rounds)
        for name in names
        for optimizer in ("SGD", "Adam")
        for m in levels
    ]


def _targets(targets: Mapping[tuple[str, str], Sequence[Target]]) -> dict[tuple[str, str, str, int], Target]:
    return {
        (title, "float32", optimizer, m): target
        for (title, optimizer), of_levels in targets.items()
        for m, target in zip(LEVELS, of_levels, strict=True)
    }


_ALL = [(title, optimizer) for title in ("1M, 1 thread", "16M, 2 threads") for optimizer in ("SGD", "Adam")]
_LIMIT = {
    ("1M, 1 thread", "SGD"): at_most(1.2, 1.7, 2.5),
    ("1M, 1 thread", "Adam"): at_most(2, 2.2, 2.8),
    ("16M, 2 threads", "SGD"): at_most(1.1, 1.1, 1.1),
    ("16M, 2 threads", "Adam"): at_most(1.1, 1.1, 1.1),
}

TABLES = [
    Table(
        "quped_step: optimizer, l1 prox, codes, counts and R in one pass",
        "float32. limit: what the step must read and write, in place (SGD: x, gradient, momentum, and back x, momentum; Adam: "
        "one more of each), by the best of our memory streams, ordinary or non-temporal, and torch's copy; the codes are left "
        "out of it. native: the kernel call, outputs given. op: the same through torch.ops. eager: torch's foreach optimizer, "
        "then our ops in eager PyTorch; lean eager: the prox rewritten to save passes; published: masks over the weights "
        "repeated m times (bench/rivals.py; not timed where these take 1 GiB). In brackets the targets.",
        [
            Column("native", "native"),
            Column("op", "op"),
            Column("limit", "limit"),
            Column("native / limit", "native", "limit", _targets(_LIMIT)),
            Column("eager / op", "eager", "op", _targets({key: at_least(45, 45, 28) for key in _ALL})),
            Column("lean eager / op", "lean eager", "op"),
            Column("published / op", "published", "op", _targets({key: at_least(100, 500, 500) for key in _ALL})),
        ],
        variant="optimizer",
    )
]
