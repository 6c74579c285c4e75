"""lut_linear by tiles: sizes at which blocks of codes, rows of W and rows of x are whole, or one short or over."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qupedkern as qk
from qupedkern.backends import EAGER
from qupedkern.testing.harness import check, kernels, run, same_bits

BACKENDS = [backend for op, backend in kernels() if op == "lut_linear"]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERY_KERNEL = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != EAGER])  # eager's sums are torch's
TYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_OF_TILES = 7  # rows of x from which no other kernel runs, but for 1 and 2 bits with one table

depths = st.sampled_from((1, 7, 8, 31, 128, 255, 256, 257, 264, 384, 512, 513, 520, 768, 1024, 1032))
heights = st.sampled_from((1, 15, 16, 17, 33, 64, 65, 80))
batches = st.sampled_from((4, 7, 8, 16, 23, 24, 25, 49))


@st.composite
def layers(draw: st.DrawFn, least: int = 1) -> tuple[Any, ...]:
    """Arguments of lut_linear without hostile values: what matters here is the shape."""
    out, inputs, bits = draw(heights), draw(depths), draw(st.integers(1, 8))
    dtype = draw(st.sampled_from(TYPES))
    numel = out * inputs
    blocks = [length for length in (8, 16, 32, 64, 128, 256, inputs, 2 * inputs, 3, numel) if numel % length == 0]
    groups, levels = numel // draw(st.sampled_from(blocks)), draw(st.sampled_from((1 << bits, max(2, (1 << bits) - 1))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(0, levels, (out, inputs), dtype=torch.uint8, generator=generator)
    centers = torch.randn(groups, levels, generator=generator).sort(1)[0]
    centers = centers.to(draw(st.sampled_from((dtype, torch.float32))))
    x = torch.randn(max(draw(batches), least), inputs, generator=generator).to(dtype)
    bias = draw(st.sampled_from((None, torch.randn(out, generator=generator).to(dtype))))
    return x, qk.pack_codes(codes, bits), centers, bias, bits, (out, inputs)


def call(args: tuple[Any, ...], backend: str) -> Tensor:
    x, packed, centers, bias, bits, shape = args
    bias = None if bias is None else bias.float()
    (out,) = run("lut_linear", (x, packed, centers.float(), bias, bits, list(shape)), backend) or (None,)
    assert out is not None
    return out


@EVERY_BACKEND
@settings(max_examples=60, deadline=None)
@given(layers())
def test_whole_and_ragged_tiles_are_within_the_bound(backend: str, args: tuple[Any, ...]) -> None:
    x, packed, centers, bias, bits, shape = args
    check(
        "lut_linear", (x, packed, centers.float(), None if bias is None else bias.float(), bits, list(shape)), backend
    )


@EVERY_KERNEL
@settings(max_examples=40, deadline=None)
@given(layers(least=2 * LEAST_OF_TILES), st.data())
def test_a_row_has_the_same_bits_in_every_batch_of_a_regime(
    backend: str, args: tuple[Any, ...], data: st.DataObject
) -> None:
    x, *rest = args
    first = data.draw(st.integers(0, x.shape[0] - LEAST_OF_TILES))
    last = data.draw(st.integers(first + LEAST_OF_TILES, x.shape[0]))
    together = call((x, *rest), backend)
    assert same_bits(call((x[first:last].contiguous(), *rest), backend), together[first:last])


@EVERY_KERNEL
@settings(max_examples=20, deadline=None)
@given(layers(), st.integers(2, 5))
def test_any_number_of_threads_gives_the_same_bits(backend: str, args: tuple[Any, ...], threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = call(args, backend)
        torch.set_num_threads(threads)
        assert same_bits(call(args, backend), alone)
    finally:
        torch.set_num_threads(before)


@EVERY_BACKEND
@pytest.mark.parametrize("tiny", [1e-40, 2.0**-127, 2.0**-126])
def test_bfloat16_below_the_normal_numbers_is_within_the_bound(backend: str, tiny: float) -> None:
    centers = torch.tensor([-1.0, -tiny, tiny, 3.0], dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    packed = qk.pack_codes(torch.randint(0, 4, (16, 64), dtype=torch.uint8, generator=generator), 2)
    x = torch.where(torch.rand(8, 64, generator=generator) < 0.5, tiny, torch.randn(8, 64, generator=generator))
    check("lut_linear", (x.to(torch.bfloat16), packed, centers.float(), None, 2, [16, 64]), backend)


def behind_a_wall(values: Tensor) -> Tensor:
    """A copy whose last byte is the last of a page, before one that may not be read."""
    size = values.numel() * values.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + pages), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0, ctypes.get_errno()
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=pages - size).view(values.shape)
    return copy.copy_(values)


@pytest.mark.skipif(sys.platform != "linux", reason="guards a page by mprotect, as Linux has it")
@EVERY_KERNEL
@settings(max_examples=40, deadline=None)
@given(layers())
def test_nothing_is_read_behind_the_codes_or_x(backend: str, args: tuple[Any, ...]) -> None:
    x, packed, centers, bias, bits, shape = args
    walled = (behind_a_wall(x), behind_a_wall(packed), behind_a_wall(centers), bias, bits, shape)
    assert same_bits(call(walled, backend), call(args, backend))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the native kernels are not built here")
def test_without_bfloat16_products_a_result_is_that_of_float32_rounded() -> None:
    script = """
import torch, qupedkern as qk
g = torch.Generator().manual_seed(0)
for bits, groups in ((4, 1), (3, 48), (4, 48), (6, 1)):
    packed = qk.pack_codes(torch.randint(0, 1 << bits, (48, 520), dtype=torch.uint8, generator=g), bits)
    centers = torch.randn(groups, 1 << bits, generator=g).sort(1)[0].to(torch.bfloat16)
    x = torch.randn(20, 520, generator=g).to(torch.bfloat16)
    with qk.use_backend("cpp"):
        half = qk.lut_linear(x, packed, centers, None, bits, (48, 520))
        single = qk.lut_linear(x.float(), packed, centers.float(), None, bits, (48, 520))
    assert torch.equal(half, single.to(torch.bfloat16)), (bits, groups)
"""
    environment = {**os.environ, "QUPEDKERN_DISABLE": "avx512_bf16"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
