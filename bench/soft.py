"""soft_quantize forward and backward: the native call and the torch op against the machine's limit and four rivals.

Forward reads x and writes S; backward reads g and x, writes grad_x and reduces grad_c: 5 passes over the tensor, the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import qupedkern as qk
from qupedkern.ops._call import attempt

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
ONE_GRAPH_LEVELS = 4  # of several tensors a graph of all is 1.3 to 3 times faster; beyond, compiling it takes minutes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Result = rivals.Result


def _op(case: Tensors) -> Callable[[], list[Result]]:
    """Forward and backward as training calls them, without autograd: of several tensors, in one call on lists each."""
    if len(case.xs) == 1:
        g, x, c, p = case.grads[0], case.xs[0], case.centers[0], case.sharpness[0]
        return lambda: [(qk.soft_quantize(x, c, p), *attempt("soft_quantize_backward", (g, x, c, p)))]

    def run() -> list[Result]:
        soft = qk.foreach_soft_quantize(case.xs, case.centers, [*case.sharpness])
        arguments = (case.grads, case.xs, case.centers, case.sharpness)
        return list(zip(soft, *attempt("foreach_soft_quantize_backward", arguments), strict=True))

    return run


def _names(case: Tensors) -> tuple[str, str]:
    """The ops of forward and backward: on one tensor, or on the list of them."""
    name = "soft_quantize" if len(case.xs) == 1 else "foreach_soft_quantize"
    return name, f"{name}_backward"


def _native(case: Tensors) -> Callable[[], list[Result]]:
    """The two native calls on outputs allocated beforehand."""
    names = _names(case)
    soft, grad_x = ([torch.empty_like(x) for x in case.xs] for _ in range(2))
    grad_c = [torch.empty_like(c) for c in case.centers]
    results = list(zip(soft, grad_x, grad_c, strict=True))
    if len(case.xs) == 1:
        inputs = (case.xs[0], case.centers[0], case.sharpness[0])
        forward = native_call(names[0], inputs, (soft[0],))
        backward = native_call(names[1], (case.grads[0], *inputs), (grad_x[0], grad_c[0]))
    else:
        lists = (case.xs, case.centers, case.sharpness)
        forward = native_call(names[0], lists, (soft,))
        backward = native_call(names[1], (case.grads, *lists), (grad_x, grad_c))

    def run() -> list[Result]:
        forward()
        backward()
        return results

    return run


def _all_by_hand(grads: list[Tensor], xs: list[Tensor], centers: list[Tensor], sharpness: list[Tensor]) -> list[Result]:
    return [rivals.soft_by_hand(*one) for one in zip(grads, xs, centers, sharpness, strict=True)]


def _rivals(case: Tensors, compiled: bool) -> dict[str, Callable[[], list[Result]]]:
    arguments = (case.grads, case.xs, case.centers, case.sharpness)
    found: dict[str, Callable[[], list[Result]]] = {
        "eager": lambda: rivals.soft_by_autograd(*arguments, rivals.soft_formula),
        "eager, by hand": lambda: _all_by_hand(*arguments),
    }
    if compiled:
        torch.compiler.reset()  # every case has the same code and other shapes
        formula = torch.compile(rivals.soft_formula, dynamic=False)
        found["compile"] = lambda: rivals.soft_by_autograd(*arguments, formula)
        if len(case.xs) == 1 or len(case.centers[0]) <= ONE_GRAPH_LEVELS:
            one_graph = torch.compile(_all_by_hand, dynamic=False)
            found["compile, by hand"] = lambda: one_graph(*arguments)
        else:
            by_hand = torch.compile(rivals.soft_by_hand, dynamic=False)
            found["compile, by hand"] = lambda: [by_hand(*one) for one in zip(*arguments, strict=True)]
    return found


def truth(case: Tensors) -> list[Result]:
    """S and both gradients by the formula in float64."""
    doubled = ([t.double() for t in part] for part in (case.grads, case.xs, case.centers, case.sharpness))
    return [rivals.soft_by_hand(*one) for one in zip(*doubled, strict=True)]


def check(name: str, got: Sequence[Result], true: Sequence[Result], case: Tensors) -> None:
    """RuntimeError unless a result is the true one, so that a wrong one gets no time.

    Allowed: 1e-4 of the largest value (2e-2 for half types, which round to 8 bits); 1e-6 sum |g| in sums over a tensor.
    """
    for i, (result, expected, x, g) in enumerate(zip(got, true, case.xs, case.grads, strict=True)):
        share = 1e-4 if x.dtype == torch.float32 else 2e-2
        room = [0.0, 0.0, 1e-6 * float(g.double().abs().sum())]
        for part, a, b, extra in zip(("S", "grad_x", "grad_c"), result, expected, room, strict=True):
            allowed = share * float(b.abs().max()) + extra
            error = float((a.double() - b).abs().max())
            if not error <= allowed:
                raise RuntimeError(f"{name}: {part} of tensor {i} is off by {error:.2g}, allowed are {allowed:.2g}")


def _moves(work: Workload, dtype: torch.dtype) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The passes over a tensor, of several tensors as if they were one: no cost of calls in the limit."""
    x, g, soft, grad_x = scratch(4, work.numel, dtype)
    return [([x], [soft]), ([g, x], [grad_x])]


def measure(work: Workload, m: int, dtype: str, *, rounds: int, compiled: bool) -> Row:
    """One row, every candidate checked before it is timed."""
    torch.set_num_threads(work.threads)
    case = tensors(work, m, DTYPES[dtype])
    candidates: dict[str, Callable[[], Any]] = {"op": _op(case), **_rivals(case, compiled)}
    if available(_names(case)[1]):
        candidates = {"native": _native(case), **candidates}
    true = truth(case)
    for name, candidate in candidates.items():
        check(name, candidate(), true, case)
    del true
    moves = _moves(work, DTYPES[dtype])
    return timed("soft", work, m, candidates, moves, rounds=rounds, dtype=dtype)


def _targets(title: str, targets: Sequence[Target]) -> dict[tuple[str, str, str, int], Target]:
    return {(title, "float32", "", m): target for m, target in zip(LEVELS, targets, strict=True)}


TABLES = [
    Table(
        "soft_quantize, forward and backward",
        "limit: the same 5 passes (read x, write S; read g and x, write grad_x) by the best of our memory streams, ordinary "
        "or non-temporal, and torch's copy. native: the two kernel calls, outputs given. op: the public call and the gradient's as "
        "optimizers make it, which check their arguments and allocate outputs. eager and compile: the formula under autograd, "
        "tensor by tensor; by hand: its gradient written out in PyTorch, compiled for all tensors as one graph where m <= 4. "
        "In brackets the targets.",
        [
            Column("native", "native"),
            Column("op", "op"),
            Column("limit", "limit"),
            Column(
                "native / limit",
                "native",
                "limit",
                {
                    **_targets("16M, 2 threads", at_most(1.1, 1.6, 3.5)),
                    **_targets("1M, 1 thread", at_most(1.5, 3, 5.5)),
                },
            ),
            Column(
                "eager / op",
                "eager",
                "op",
                {
                    **_targets("16M, 2 threads", at_least(12, 16, 34)),
                    **_targets("ResNet-20, 1 thread", at_least(23, 28, 30)),
                },
            ),
            Column(
                "compile / op",
                "compile",
                "op",
                {
                    **_targets("16M, 2 threads", at_least(3, 5, 10)),
                    **_targets("ResNet-20, 1 thread", at_least(20, 16, 10)),
                },
            ),
            Column("eager by hand / op", "eager, by hand", "op"),
            Column("compile by hand / op", "compile, by hand", "op"),
        ],
    )
]


def rows(names: Sequence[str], levels: Sequence[int], *, rounds: int, threads: int | None, compiled: bool) -> list[Row]:
    """All rows of one process."""
    return [
        measure(work, m, dtype, rounds=rounds, compiled=compiled)
        for work, dtype, m in each(names, tuple(DTYPES), levels, threads)
    ]
