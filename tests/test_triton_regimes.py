"""lut_linear's ways through Triton: parts of k, the weight written out, a pinned batch. On a GPU, or interpreted."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qupedkern as qk
from qupedkern.backends import module
from qupedkern.ops import OPS
from qupedkern.testing.harness import check, device_of, on_device_of, run, same_bits
from qupedkern.testing.strategies import CALM, HOSTILE, INPUTS

pytestmark = pytest.mark.skipif(
    module("triton").unavailable() is not None, reason="no GPU here, and Triton does not interpret"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tiles() -> Any:
    return importlib.import_module("qupedkern.kernels._lut")


def long_rows(bits: int, dtype: torch.dtype, batch: int, groups: int = 1, K: int = 2048) -> tuple[Any, ...]:
    """A weight of few rows, long enough to be cut into parts."""
    N, draw = 24, torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (N, K), generator=draw, dtype=torch.uint8)
    rows = (groups,) if groups > 1 else ()
    c = torch.randn(*rows, max(1 << bits, 2), generator=draw).sort(dim=-1).values
    x, bias = torch.randn(batch, K, generator=draw).to(dtype), torch.randn(N, generator=draw)
    return x, OPS["pack_codes"].reference(codes, bits), c, bias, bits, [N, K]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_parts_of_a_long_row_add_up(bits: int, dtype: torch.dtype) -> None:
    args = long_rows(bits, dtype, 3, groups=24 if bits == 4 else 1)
    weight = tiles().weight_of(args[1], args[2], bits, args[5], dtype)
    assert weight.steps > weight.part_steps, "one part: this test would say nothing"
    if bits in (1, 3, 5) and dtype == torch.bfloat16:
        assert weight.words == 2, "not read 16 bytes at a time: this test would say nothing"
    check("lut_linear", args, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_bits_it_has_alone_in_every_pinned_batch(dtype: torch.dtype) -> None:
    args = long_rows(3, dtype, 37)
    with qk.batch_invariant(True):
        (together,) = run("lut_linear", args, "triton") or ()
        for rows in (slice(0, 1), slice(5, 6), slice(3, 37)):
            (alone,) = run("lut_linear", (args[0][rows].contiguous(), *args[1:]), "triton") or ()
            assert same_bits(alone, together[rows])


@settings(max_examples=8)
@given(st.data())
def test_a_weight_that_is_written_out_gives_the_same_within_the_bound(data: st.DataObject) -> None:
    args = OPS["lut_linear"].prepare(*data.draw(INPUTS["lut_linear"](data.draw(st.sampled_from((CALM, HOSTILE))))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles(), "CROSSOVERS", CROSSOVERS := dict.fromkeys(DTYPES, (0, 1)))
        patch.setattr(importlib.import_module("qupedkern.kernels.lut_linear"), "CROSSOVERS", CROSSOVERS)
        check("lut_linear", args, "triton")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_written_out_weights_are_used_where_they_are_exact_and_only_there(dtype: torch.dtype, exact: bool) -> None:
    kernels = importlib.import_module("qupedkern.kernels.lut_linear")
    x, packed, c, bias, bits, shape = long_rows(2, dtype, 4)
    if exact:
        c, bias = c.to(dtype).float(), bias.to(dtype).float()
    x, packed, c, bias = on_device_of("triton", (x, packed, c, bias))
    out = torch.empty(4, shape[0], dtype=dtype, device=device_of("triton"))
    done = kernels._written_out(x, packed, c, bias, bits, shape, out)
    assert bool(done.item()) == exact
