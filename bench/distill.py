"""distillation_loss, forward and backward to both logits: against the op in eager PyTorch and the composition a user writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qupedkern as qk

from . import machine
from .native import available, native_call
from .records import Row
from .tables import Column, Table
from .targets import at_least
from .timing import interleaved

NAMES = ("128",)  # examples
QUICK = ("8",)
LEVELS = (10, 100, 1000, 50000)  # classes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEMPERATURE = 2.0

Result = tuple[Tensor, Tensor, Tensor]  # the loss and its gradients to student and teacher


def composition(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss as users of PyTorch write it."""
    log_p, p_w = F.log_softmax(student / TEMPERATURE, dim=1), F.softmax(teacher / TEMPERATURE, dim=1)
    return F.kl_div(log_p, p_w, reduction="batchmean") * TEMPERATURE**2


def _by_autograd(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> Callable[[], Result]:
    leaves = [z.clone().requires_grad_() for z in (student, teacher)]

    def run() -> Result:
        value = loss(*leaves)
        to_student, to_teacher = torch.autograd.grad(value, leaves)
        return value.detach(), to_student, to_teacher

    return run


def _op(student: Tensor, teacher: Tensor) -> Tensor:
    return qk.distillation_loss(student, teacher, TEMPERATURE)


def _eager(run: Callable[[], Result]) -> Callable[[], Result]:
    def forced() -> Result:
        with qk.use_backend("eager"):
            return run()

    return forced


def _native(student: Tensor, teacher: Tensor) -> Callable[[], Result]:
    loss, kept, grad = torch.empty(()), torch.empty(len(student), 5), torch.ones(())
    gradients = torch.empty_like(student), torch.empty_like(teacher)
    forward = native_call("distillation_loss", (student, teacher, TEMPERATURE), (loss, kept))
    backward = native_call("distillation_loss_backward", (grad, student, teacher, TEMPERATURE, kept), gradients)

    def run() -> Result:
        forward()
        backward()
        return loss, *gradients

    return run


def check(name: str, got: Result, student: Tensor, teacher: Tensor) -> None:
    """RuntimeError unless loss and gradients are within 1e-4 of the largest of the float64 ones; 3e-2 where they are half."""
    true = _by_autograd(composition, student.double(), teacher.double())()
    share = 1e-4 if student.dtype == torch.float32 else 3e-2
    for part, a, b in zip(("loss", "student's gradient", "teacher's gradient"), got, true, strict=True):
        error, allowed = float((a.double() - b).abs().max()), share * float(b.abs().max())
        if not error <= allowed:
            raise RuntimeError(f"{name}: the {part} is off by {error:.2g}, allowed are {allowed:.2g}")


def measure(examples: int, classes: int, dtype: str, *, threads: int, rounds: int, compiled: bool) -> Row:
    """One row, every candidate checked before it is timed."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(examples, classes, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    op = _by_autograd(_op, student, teacher)
    candidates: dict[str, Callable[[], Any]] = {
        "op": op,
        "eager": _eager(op),
        "composition": _by_autograd(composition, student, teacher),
    }
    if available("distillation_loss_backward"):
        candidates = {"native": _native(student, teacher), **candidates}
    if compiled:
        torch.compiler.reset()
        candidates["compile"] = _by_autograd(torch.compile(composition, dynamic=False), student, teacher)
    for name, candidate in candidates.items():
        check(name, candidate(), student, teacher)
    timings = interleaved(candidates, rounds=rounds)
    return Row(
        bench="distill",
        name=str(examples),
        title=f"{examples} examples, {threads} thread{'s' if threads > 1 else ''}",
        m=classes,
        dtype=dtype,
        variant="",
        bytes=6 * student.nbytes,  # both logits are read twice, both gradients written
        time_us_p20_p50_p80={name: timing.rounded() for name, timing in timings.items()},
        machine=machine.description(),
    )


_TWICE = {("128 examples, 1 thread", "float32", "", classes): at_least(2)[0] for classes in LEVELS}
TABLES = [
    Table(
        "distillation_loss, forward and backward to student and teacher",
        "native: the two kernel calls, outputs given. op: the same through torch.ops and autograd. eager: the op's reference "
        "formula. composition: kl_div(log_softmax(student / T), softmax(teacher / T)) T^2 under autograd; compile: that, compiled. "
        "In brackets the targets.",
        [
            Column("native", "native"),
            Column("op", "op"),
            Column("eager / op", "eager", "op", _TWICE),
            Column("composition / op", "composition", "op", _TWICE),
            Column("compile / op", "compile", "op"),
        ],
        tensors="logits",
        level="classes",
    )
]


def rows(names: Sequence[str], levels: Sequence[int], *, rounds: int, threads: int | None, compiled: bool) -> list[Row]:
    """All rows of one process; names are numbers of examples, levels numbers of classes."""
    return [
        measure(int(name), classes, dtype, threads=threads or 1, rounds=rounds, compiled=compiled)
        for name in names
        for dtype in DTYPES
        for classes in levels
    ]
