"""What holds for every op on every backend that runs here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qupedkern.ops import OPS
from qupedkern.testing.harness import check, kernels
from qupedkern.testing.strategies import HOSTILE, INPUTS

KERNELS = kernels()


def test_every_op_has_inputs() -> None:
    assert set(INPUTS) == set(OPS)


@pytest.mark.parametrize(("op", "backend"), KERNELS)
@given(st.data())
def test_matches_the_float64_reference_within_its_bound(op: str, backend: str, data: st.DataObject) -> None:
    args = data.draw(INPUTS[op](HOSTILE))
    check(op, OPS[op].prepare(*args), backend)
