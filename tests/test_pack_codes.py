"""pack_codes and unpack_codes are exact inverses, and the bytes are those of the documented format."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

import qupedkern as qk
from qupedkern.testing.harness import running_backends
from qupedkern.testing.strategies import HOSTILE, Limits, pack_codes_inputs, unpack_codes_inputs

ON_EVERY_BACKEND = pytest.mark.parametrize("backend", running_backends())
SMALL = Limits(numel=300)

# Bits 5 to 7 once let the low bits of a code's neighbour shine through.
NEIGHBOURS = (torch.tensor([11, 16, 24], dtype=torch.uint8), 5)


def stream_of(codes: Tensor, bits: int) -> list[int]:
    """The bytes by way of one large integer: code i in bits [bits i, bits i + bits), little-endian."""
    number = sum(code << (bits * i) for i, code in enumerate(codes.reshape(-1).tolist()))
    return list(number.to_bytes(-(-codes.numel() * bits // 8), "little"))


@ON_EVERY_BACKEND
@given(case=pack_codes_inputs(HOSTILE))
@example(case=NEIGHBOURS)
def test_unpacking_inverts_packing(backend: str, case: tuple[Tensor, int]) -> None:
    codes, bits = case
    with qk.use_backend(backend):
        assert torch.equal(qk.unpack_codes(qk.pack_codes(codes, bits), bits, codes.shape), codes)


@ON_EVERY_BACKEND
@given(case=pack_codes_inputs(SMALL))
@example(case=NEIGHBOURS)
def test_the_bytes_are_the_little_endian_stream_with_unused_bits_zero(backend: str, case: tuple[Tensor, int]) -> None:
    codes, bits = case
    with qk.use_backend(backend):
        assert qk.pack_codes(codes, bits).tolist() == stream_of(codes, bits)


@ON_EVERY_BACKEND
@given(case=unpack_codes_inputs(SMALL))
def test_packing_inverts_unpacking_up_to_the_unused_bits(backend: str, case: tuple[Any, ...]) -> None:
    packed, bits, shape = case
    expected = packed.clone()
    unused = -math.prod(shape) * bits % 8
    if unused and packed.numel():
        expected[-1] &= 0xFF >> unused
    with qk.use_backend(backend):
        codes = qk.unpack_codes(packed, bits, shape)
        assert codes.shape == torch.Size(shape)
        assert torch.equal(qk.pack_codes(codes, bits), expected)


@ON_EVERY_BACKEND
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", [*range(20), 63, 64, 65, 4097, 70_001])
def test_every_width_and_tail_round_trips(backend: str, bits: int, numel: int) -> None:
    codes = torch.randint(0, 1 << bits, (numel,), dtype=torch.uint8, generator=torch.Generator().manual_seed(numel))
    with qk.use_backend(backend):
        packed = qk.pack_codes(codes, bits)
        assert packed.numel() == -(-numel * bits // 8)
        assert torch.equal(qk.unpack_codes(packed, bits, (numel,)), codes)


@ON_EVERY_BACKEND
@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("position", [0, 7, 8, 64, 4096])
def test_a_code_that_does_not_fit_is_refused_wherever_it_stands(backend: str, bits: int, position: int) -> None:
    codes = torch.zeros(4097, dtype=torch.uint8)
    codes[position] = 1 << bits
    sentence = rf"^pack_codes: codes must be below 2\*\*{bits} = {1 << bits}, got {1 << bits}$"
    with qk.use_backend(backend), pytest.raises(ValueError, match=sentence):
        qk.pack_codes(codes, bits)


def test_known_bytes() -> None:
    codes = torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8)
    assert qk.pack_codes(codes, 2).tolist() == [0b00_11_10_01, 0b01]
    assert qk.pack_codes(codes, 3).tolist() == [0b11_010_001, 0b0_001_000_0]
    assert qk.pack_codes(codes, 8).tolist() == codes.tolist()
