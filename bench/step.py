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

from . import rivals
from .against_streams import each, timed
from .native import available, native_call
from .records import Row
from .streams import scratch
from .tables import Column, Table
from .targets import Target, at_least, at_most
from .workloads import Tensors, Workload, tensors

NAMES = ("1M", "ResNet-20", "16M")
QUICK = ("64k",)
LEVELS = (2, 4, 16)
STRENGTH = 1e-6
# So small a rate that thousands of repeated steps leave the weights where they are; the work does not depend on it.
SGD = {"lr": 1e-6, "weight_decay": 1e-4, "momentum": 0.9}
ADAM = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8}
REPEATED_GIB = 1.0  # the published procedure is not timed where its weights, repeated m times, take as much


@dataclass
class State:
    """One candidate's own x, gradients and optimizer state, all of it after step 1, and the codebooks they share."""

    x: list[Tensor]
    grad: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    centers: list[Tensor]
    strength: list[Tensor]

    @classmethod
    def of(cls, case: Tensors) -> State:
        grad = [1e-3 * g for g in case.grads]
        strength = [torch.tensor([STRENGTH]) for _ in grad]
        return cls(
            [x.clone() for x in case.xs], grad, [g.clone() for g in grad], [g * g for g in grad], case.centers, strength
        )

    def kept(self, optimizer: str) -> dict[str, list[Tensor]]:
        """What a step writes, by which rivals are compared."""
        found = {"x": self.x, "first": self.first, "second": self.second}
        return found if optimizer == "Adam" else {name: found[name] for name in ("x", "first")}


def _arguments(state: State, optimizer: str) -> tuple[Any, ...]:
    """Arguments of the op for the second step: momentum and moments are there."""
    if optimizer == "Adam":
        second, numbers = state.second, (ADAM["lr"], 0.0, *ADAM["betas"], ADAM["eps"])  # type: ignore[misc]
    else:
        second, numbers = [], (SGD["lr"], SGD["weight_decay"], SGD["momentum"], 0.0, 0.0)
    lists: tuple[list[Any], ...] = (state.x, state.grad, [], state.first, second, state.centers, [], state.strength)
    return (*lists, "none", optimizer.lower(), "l1", *numbers, False, 2, False, True, 0)


def _results(state: State, outputs: tuple[Any, ...]) -> list[rivals.Moved]:
    _, counts, _, distance, codes = outputs
    return list(zip(state.x, codes, counts, distance, strict=True))


def _op(state: State, optimizer: str) -> Callable[[], list[rivals.Moved]]:
    arguments = _arguments(state, optimizer)
    return lambda: _results(state, torch.ops.qupedkern.quped_step(*arguments))


def _native(state: State, optimizer: str) -> Callable[[], list[rivals.Moved]]:
    arguments = _arguments(state, optimizer)
    outputs = OPS["quped_step"].allocate(*arguments)
    call, results = native_call("quped_step", arguments, outputs), _results(state, outputs)

    def run() -> list[rivals.Moved]:
        call()
        return results

    return run


def _rival(state: State, optimizer: str, prox: Callable[..., rivals.Moved]) -> Callable[[], list[rivals.Moved]]:
    """A step of torch's own optimizer, foreach, then a rival's prox with codes, counts and R, written back to x."""
    weights = [torch.nn.Parameter(x) for x in state.x]
    if optimizer == "SGD":
        inner: torch.optim.Optimizer = torch.optim.SGD(weights, **SGD, foreach=True)  # type: ignore[arg-type]
    else:
        inner = torch.optim.Adam(weights, **ADAM, foreach=True)  # type: ignore[arg-type]
    for weight, grad, first, second in zip(weights, state.grad, state.first, state.second, strict=True):
        weight.grad = grad
        adam = {"step": torch.tensor(1.0), "exp_avg": first, "exp_avg_sq": second}
        inner.state[weight] = adam if optimizer == "Adam" else {"momentum_buffer": first}

    def run() -> list[rivals.Moved]:
        inner.step()
        results = []
        for x, centers, strength in zip(state.x, state.centers, state.strength, strict=True):
            moved, codes, counts, distance = prox(x, centers, strength)
            results.append((x.copy_(moved), codes, counts, distance))
        return results

    return run


def check(
    name: str,
    got: Sequence[rivals.Moved],
    kept: Mapping[str, Sequence[Tensor]],
    expected: Sequence[rivals.Moved],
    true: Mapping[str, Sequence[Tensor]],
) -> None:
    """RuntimeError unless a step left the same weights and state, codes, counts and R, so that a wrong one gets no time.

    Allowed: 2 ulp of the largest value in weights and state (rivals round the prox otherwise), hence one code and count in
    10^5, where the weight is as near to a midpoint, and 1e-4 of R, which rivals sum in one go. How many lie above and below
    also turns on the last bit of weights on their centers.
    """
    for part, tensors_of in true.items():
        for a, b in zip(kept[part], tensors_of, strict=True):
            if not float((a - b).abs().max()) <= 2.4e-7 * float(b.abs().max()):
                raise RuntimeError(f"{name}: {part} disagrees with the reference")
    for (_, codes, counts, distance), (_, right, members, whole) in zip(got, expected, strict=True):
        room = 1 + right.numel() // 100_000
        apart = {
            "codes": (int((codes != right).sum()), room),
            "members": (int((counts[0].flatten() - members[0].flatten()).abs().max()), room),
            "members above or below": (int((counts - members).abs().max()), room + right.numel() // 1000),
            "R": (float((distance - whole).abs()), 1e-4 * float(whole)),
        }
        for part, (error, allowed) in apart.items():
            if not error <= allowed:
                raise RuntimeError(f"{name}: {part} disagree{'' if part != 'R' else 's'} with the reference")


Candidate = tuple[State, Callable[[], list[rivals.Moved]]]


def _candidates(case: Tensors, optimizer: str, m: int) -> dict[str, Candidate]:
    def made(build: Callable[..., Callable[[], list[rivals.Moved]]], *more: Any) -> Candidate:
        state = State.of(case)
        return state, build(state, optimizer, *more)

    found = {
        **({"native": made(_native)} if available("quped_step") else {}),
        "op": made(_op),
        "eager": made(_rival, rivals.prox_by_ops),
        "lean eager": made(_rival, rivals.prox_lean),
    }
    if m * max(x.nbytes for x in case.xs) < REPEATED_GIB * 2**30:
        found["published"] = made(_rival, rivals.prox_published)
    return found


def measure(work: Workload, m: int, optimizer: str, *, rounds: int) -> Row:
    """One row, every candidate's first step checked before it is timed."""
    torch.set_num_threads(work.threads)
    case = tensors(work, m)
    right = State.of(case)
    expected = _results(right, OPS["quped_step"].reference(*_arguments(right, optimizer)))
    candidates = _candidates(case, optimizer, m)
    for name, (state, run) in candidates.items():
        check(name, run(), state.kept(optimizer), expected, right.kept(optimizer))
    streams = scratch(3 if optimizer == "SGD" else 4, work.numel)
    written = [streams[0], *streams[2:]]  # all but the gradient
    runs = {name: run for name, (_, run) in candidates.items()}
    return timed("step", work, m, runs, [(streams, written)], rounds=rounds, variant=optimizer)


def rows(names: Sequence[str], levels: Sequence[int], *, rounds: int, threads: int | None, compiled: bool) -> list[Row]:
    """All rows of one process."""
    cases = each(names, ("SGD", "Adam"), levels, threads)
    return [measure(work, m, optimizer, rounds=rounds) for work, optimizer, m in cases]


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
        "out of it, and several tensors count as one. native: the kernel call, outputs given. op: the same through torch.ops. "
        "eager: torch's foreach optimizer, then our ops in eager PyTorch; lean eager: the prox rewritten to save passes; "
        "published: masks over the weights repeated m times (bench/rivals.py; not timed where these take 1 GiB). In brackets the "
        "targets.",
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
