"""lut_linear: what holds beside the properties of every op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import qupedkern as qk
from qupedkern.ops import OPS
from qupedkern.testing.harness import kernels, run, same_bits
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
