"""lut_linear: what holds beside the properties of every op."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import qupedkern as qk
from qupedkern.ops import OPS
from qupedkern.testing.harness import check, kernels, run, same_bits
from qupedkern.testing.strategies import CALM, HOSTILE, INPUTS

BACKENDS = [backend for op, backend in kernels() if op == "lut_linear"]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
CASES = INPUTS["lut_linear"](HOSTILE)


@EVERY_BACKEND
@given(CASES)
def test_no_bias_is_a_bias_of_zero(backend: str, case: tuple[Any, ...]) -> None:
    x, packed, centers, bias, bits, shape = OPS["lut_linear"].prepare(*case)
    without = run("lut_linear", (x, packed, centers, None, bits, shape), backend)
    with_zero = run("lut_linear", (x, packed, centers, torch.zeros_like(bias), bits, shape), backend)
    for value, other in zip(without or (), with_zero or (), strict=True):
        assert torch.equal(value.nan_to_num(), other.nan_to_num())  # of zeros the sign may differ


@EVERY_BACKEND
@settings(max_examples=30)
@given(CASES, st.data())
def test_a_row_has_the_same_bits_alone_where_batches_are_pinned(
    backend: str, case: tuple[Any, ...], data: st.DataObject
) -> None:
    x, *rest = OPS["lut_linear"].prepare(*case)
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(0, x.shape[-1])
    assume(rows.shape[0] > 0)
    row = data.draw(st.integers(0, rows.shape[0] - 1))
    with qk.batch_invariant(True):
        together = run("lut_linear", (rows, *rest), backend)
        alone = run("lut_linear", (rows[row : row + 1].contiguous(), *rest), backend)
    for value, other in zip(together or (), alone or (), strict=True):
        assert same_bits(value[row], other[0])


def test_pinning_is_undone_at_the_end_of_a_block() -> None:
    assert not qk.batch_invariant.pinned
    with qk.batch_invariant(True):
        assert qk.batch_invariant.pinned
        with qk.batch_invariant(False):
            assert not qk.batch_invariant.pinned
        assert qk.batch_invariant.pinned
    assert not qk.batch_invariant.pinned
    with pytest.raises(TypeError, match="pinned must be True or False, got int"):
        qk.batch_invariant(1)  # type: ignore[arg-type]


@EVERY_BACKEND
@given(st.data())
def test_a_code_past_the_last_center_is_refused(backend: str, data: st.DataObject) -> None:
    x, _, centers, bias, bits, shape = data.draw(INPUTS["lut_linear"](CALM))
    assume(centers.shape[-1] < 1 << bits)
    full = torch.full(tuple(shape), (1 << bits) - 1, dtype=torch.uint8)
    with qk.use_backend(backend), pytest.raises(ValueError, match=f"codes must be below m = {centers.shape[-1]}"):
        qk.lut_linear(x, qk.pack_codes(full, bits), centers, bias, bits, shape)


# Rows of W on and off the vectors' and blocks' sizes, codes a row on and off a chunk's: every kernel's edges.
KERNEL_SHAPES = [
    (1, 8),
    (15, 120),
    (16, 128),
    (17, 136),
    (64, 512),
    (65, 1024),
    (130, 1032),
    (70, 2048),
    (3, 999),
    (33, 4104),
]


def _kernel_case(shape: tuple[int, int], bits: int, groups: int, batch: int, levels: int) -> tuple[Any, ...]:
    rng = torch.Generator().manual_seed(bits * 1000 + batch)
    packed = qk.pack_codes(torch.randint(0, levels, shape, generator=rng, dtype=torch.uint8), bits)
    centers = torch.randn(groups, levels, generator=rng).sort(1).values
    x = torch.randn(batch, shape[1], generator=rng) * torch.logspace(-3, 3, shape[1])
    return x, packed, centers, torch.randn(shape[0], generator=rng), bits, list(shape)


@EVERY_BACKEND
@pytest.mark.parametrize("bits", range(1, 6))
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_every_kernel_is_a_float32_dot_product_at_its_edges(backend: str, shape: tuple[int, int], bits: int) -> None:
    blocks = shape[0] * shape[1] // 128 if shape[1] % 128 == 0 else shape[0] * shape[1]
    for groups in (1, shape[0], blocks):
        for batch, spare in ((1, 0), (2, 1), (5, 0), (16, 0), (19, 1)):
            args = _kernel_case(shape, bits, groups, batch, max((1 << bits) - spare, 2))
            check("lut_linear", args, backend)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_row_has_the_same_bits_in_batches_of_one_regime(backend: str, bits: int, dtype: torch.dtype) -> None:
    for groups in (1, 130):
        x, *rest = _kernel_case((130, 1032), bits, groups, 21, 1 << bits)
        x = x.to(dtype)
        with qk.batch_invariant(True), qk.use_backend(backend):
            alone = torch.cat([qk.lut_linear(row, *rest) for row in x.split(1)])
            for batch in (2, 3, 4, 7, 16, 21):
                assert same_bits(qk.lut_linear(x[:batch], *rest), alone[:batch])


@EVERY_BACKEND
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("groups", [1, 70])
def test_one_code_past_the_last_center_is_found_wherever_it_is(backend: str, bits: int, groups: int) -> None:
    shape, levels = (70, 1032), (1 << bits) - 1
    x, packed, centers, bias, *_ = _kernel_case(shape, bits, groups, 2, levels)
    codes = qk.unpack_codes(packed, bits, shape)
    with qk.use_backend(backend):
        for row, column in ((0, 0), (3, 517), (69, 1031), (64, 1024)):
            wrong = codes.clone()
            wrong[row, column] = levels
            for rows in (x, torch.zeros_like(x), x[:0]):
                with pytest.raises(ValueError, match=f"codes must be below m = {levels}, got {levels}"):
                    qk.lut_linear(rows, qk.pack_codes(wrong, bits), centers, bias, bits, shape)
        assert qk.lut_linear(x * math.nan, packed, centers, bias, bits, shape).isnan().all()  # x alone is no error
