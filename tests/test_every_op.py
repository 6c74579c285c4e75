"""What holds for every op on every backend that runs here: values, shapes, registration, and the same bits always."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qupedkern import use_backend
from qupedkern.ops import OPS
from qupedkern.ops._define import mutated, tensors_of
from qupedkern.testing.harness import (
    TORCH_PRODUCTS,
    as_tuple,
    check,
    device_of,
    each,
    gradient_arguments,
    kernels,
    on_device_of,
    run,
    same_bits,
)
from qupedkern.testing.strategies import CALM, HOSTILE, INPUTS, LONG, Limits
from qupedkern.testing.tolerances import BOUNDS

KERNELS = kernels()
EVERY_KERNEL = pytest.mark.parametrize(("op", "backend"), KERNELS)
Case = st.DataObject


def drawn(op: str, backend: str, data: Case, limits: Limits) -> tuple[Any, ...]:
    """Op arguments out of the public arguments of a draw; small ones for kernels that are interpreted or emulated."""
    if backend in ("cuda", "triton") and device_of(backend) == "cpu":
        numel, work = (11_000, 60_000) if limits is LONG else (2_100, 10_000)
        limits = replace(limits, numel=min(limits.numel, numel), work=min(limits.work, work))
    return OPS[op].prepare(*data.draw(INPUTS[op](limits)))


def strides_that_matter(tensor: Tensor) -> list[int]:
    """A dimension with one element, and a tensor with none, may have any."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1 and tensor.numel()]


def test_every_op_has_inputs_and_bounds() -> None:
    assert set(INPUTS) == set(OPS)
    assert set(BOUNDS) == set(OPS)


@EVERY_KERNEL
@given(st.data())
def test_matches_the_float64_reference_within_its_bound(op: str, backend: str, data: Case) -> None:
    check(op, drawn(op, backend, data, HOSTILE), backend)


@EVERY_KERNEL
@settings(max_examples=3)
@given(st.data())
def test_long_rows_match_the_reference_and_have_the_same_bits_for_1_and_2_threads_and_twice(
    op: str, backend: str, data: Case
) -> None:
    args = drawn(op, backend, data, LONG)
    results = []
    for threads in (2, 2, 2 if (op, backend) in TORCH_PRODUCTS else 1):
        torch.set_num_threads(threads)
        results.append(run(op, args, backend))
    for other in results[1:]:
        for value, repeated in zip(results[0] or (), other or (), strict=True):
            assert same_bits(value, repeated)
    check(op, args, backend)


@EVERY_KERNEL
@settings(max_examples=10)
@given(st.data())
def test_fake_outputs_have_the_real_shapes_types_and_strides(op: str, backend: str, data: Case) -> None:
    args = drawn(op, backend, data, HOSTILE)
    real = run(op, args, backend)
    if real is None:
        return
    real = real[: len(real) - sum(1 for i in mutated(op) for _ in tensors_of([args[i]]))]
    with FakeTensorMode() as mode:
        fakes = tuple(each(mode.from_tensor, a) for a in args)
        fake = as_tuple(getattr(torch.ops.qupedkern, op)(*fakes))
    for value, like in zip(real, fake, strict=True):
        assert (value.shape, value.dtype, value.device) == (like.shape, like.dtype, like.device)
        assert strides_that_matter(value) == strides_that_matter(like)


@EVERY_KERNEL
@settings(max_examples=10)
@given(st.data())
def test_arguments_are_left_as_they_were_and_outputs_share_no_memory_with_them(
    op: str, backend: str, data: Case
) -> None:
    args = drawn(op, backend, data, HOSTILE)
    before = [each(Tensor.clone, a) for a in args]
    outputs = run(op, args, backend) or ()  # what an op writes in place, `run` hands it a copy of
    for was, now in zip(tensors_of(before), tensors_of(args), strict=True):
        assert same_bits(was, now)
    for was, now in zip(before, args, strict=True):
        assert any(True for _ in tensors_of([was])) or was == now
    owned = {a.untyped_storage().data_ptr() for a in tensors_of(args) if a.numel()}
    assert not owned & {out.untyped_storage().data_ptr() for out in outputs if out.numel()}


@EVERY_KERNEL
@settings(max_examples=1, deadline=None, database=None)
@given(st.data())
def test_is_registered_as_torch_expects(op: str, backend: str, data: Case) -> None:
    args = drawn(op, backend, data, CALM)
    wanted = gradient_arguments(op)
    args = on_device_of(backend, args)
    inputs = tuple(each(lambda t: t.clone().requires_grad_(), a) if i in wanted else a for i, a in enumerate(args))
    checked = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if op == "quped_step":  # torch makes no functional form of an op that writes its arguments and returns lists
        checked.remove("test_aot_dispatch_dynamic")
    with use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.qupedkern, op).default, inputs, test_utils=checked)
