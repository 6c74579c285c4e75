"""The packed kernels in CUDA, where they run: on a GPU, or emulated in the process that tests/test_cuda.py starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import qupedkern as qk
from qupedkern.backends import has_kernel, module
from qupedkern.ops import OPS
from qupedkern.testing.harness import check, device_of, on_device_of, run, same_bits

pytestmark = pytest.mark.skipif(
    not has_kernel("cuda", "lut_linear"), reason="needs an NVIDIA GPU, or the emulator of tests/test_cuda.py"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

# Rows of W on and off the 16 of a tile, the 32 of a warp and the 256 of a block; codes a row that do and do not fill
# pieces of 16 bytes, stages of 512 and 1,024, and several slices.
SHAPES = [(1, 128), (33, 384), (20, 1536), (257, 256), (40, 3200), (21, 37), (9, 1001), (3, 784), (1, 8), (5, 2048)]


def case(
    shape: tuple[int, int], bits: int, groups: int, batch: int, dtype: torch.dtype, *, rounded: bool = False
) -> tuple[Any, ...]:
    """Op arguments. rounded: centers are numbers of x's type, as a packed layer of that type has them."""
    rng = torch.Generator().manual_seed(bits * 1000 + batch + shape[1])
    codes = torch.randint(0, 1 << bits, shape, generator=rng, dtype=torch.uint8)
    centers = torch.randn(groups, 1 << bits, generator=rng).sort(1).values
    if rounded:
        centers = centers.to(dtype).float()
    x = (torch.randn(batch, shape[1], generator=rng) * torch.logspace(-2, 2, shape[1])).to(dtype)
    return x, qk.pack_codes(codes, bits), centers, torch.randn(shape[0], generator=rng), bits, list(shape)


def groupings(shape: tuple[int, int]) -> list[int]:
    """One table, one a row, one for several rows, blocks inside a row."""
    out, inputs = shape
    return sorted({1, out, *(g for g in (out // 4, 2 * out) if g and out * inputs % g == 0)})


@DTYPES
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_shape_and_cut_into_tables_is_a_dot_product(bits: int, dtype: torch.dtype) -> None:
    turn = bits + (torch.float32, torch.bfloat16, torch.float16).index(dtype)
    for i, shape in enumerate(SHAPES):
        cuts, batch = groupings(shape), (1, 3, 8, 9, 17, 2)[(i + turn) % 6]
        for groups in {1, cuts[(i + turn) % len(cuts)]}:
            check("lut_linear", case(shape, bits, groups, batch, dtype, rounded=(i + turn) % 3 > 0), "cuda")


@DTYPES
@pytest.mark.parametrize("batch", [1, 8, 16, 32, 33, 64, 65, 130])
def test_every_tile_of_rows_of_x_is_a_dot_product(batch: int, dtype: torch.dtype) -> None:
    for bits in (1, 2, 3, 4):
        check("lut_linear", case((40, 512), bits, 1, batch, dtype, rounded=True), "cuda")
    check("lut_linear", case((40, 128), 4, 1, batch, dtype), "cuda")
    check("lut_linear", case((40, 128), 4, 40, batch, dtype), "cuda")


@DTYPES
def test_batches_with_slices_of_k_go_in_passes(dtype: torch.dtype) -> None:
    for shape, rounded in (((20, 1536), True), ((9, 1101), False)):
        check("lut_linear", case(shape, 4, 1, 131, dtype, rounded=rounded), "cuda")


@DTYPES
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_row_has_the_same_bits_in_every_batch(bits: int, dtype: torch.dtype) -> None:
    wide = (34, 1024)
    for shape, groups, rounded in ((wide, 1, True), (wide, 1, False), (wide, 34, False), ((9, 1001), 1, True)):
        x, *rest = case(shape, bits, groups, 67, dtype, rounded=rounded)
        x, *rest = on_device_of("cuda", (x, *rest))
        with qk.use_backend("cuda"):
            together = qk.lut_linear(x, *rest)
            for row in (0, 66):
                assert same_bits(qk.lut_linear(x[row : row + 1], *rest), together[row : row + 1])
            for batch in (5, 16, 30):
                assert same_bits(qk.lut_linear(x[:batch], *rest), together[:batch])


@DTYPES
def test_the_order_in_which_threads_run_changes_no_bit(dtype: torch.dtype) -> None:
    loaded = module("cuda")._loaded()  # type: ignore[attr-defined]
    if not hasattr(loaded, "set_order"):
        pytest.skip("a GPU chooses the order of its threads itself")
    cases = [
        case((70, 1024), bits, groups, batch, dtype, rounded=rounded)
        for bits, groups, batch, rounded in ((4, 1, 9, True), (3, 1, 2, False), (2, 70, 9, False), (5, 1, 3, False))
    ]
    results = []
    try:
        for order in ("forward", "backward", "shuffled"):
            loaded.set_order(order, 7)
            results.append([run("lut_linear", args, "cuda") for args in cases])
            packed, centers, bits = cases[0][1], cases[0][2][0].to(dtype), cases[0][4]
            results[-1].append(run("dequantize_packed", (packed, centers, bits, [70, 1024]), "cuda"))
    finally:
        loaded.set_order("forward", 0)
    for other in results[1:]:
        for value, repeated in zip(results[0], other, strict=True):
            assert value is not None
            assert repeated is not None
            assert same_bits(value[0], repeated[0])


def offset(tensor: torch.Tensor, skip: int) -> torch.Tensor:
    """The same elements `skip` elements into a buffer: contiguous, and aligned to nothing."""
    buffer = torch.zeros(tensor.numel() + skip, dtype=tensor.dtype)
    return buffer[skip:].view(tensor.shape).copy_(tensor)


@DTYPES
@pytest.mark.parametrize("skip", [1, 2, 4, 8])
def test_tensors_may_start_anywhere(skip: int, dtype: torch.dtype) -> None:
    x, packed, centers, bias, bits, shape = case((33, 384), 4, 1, 3, dtype, rounded=True)
    check("lut_linear", (offset(x, skip), packed, centers, bias, bits, shape), "cuda")
    check("lut_linear", (x, offset(packed, skip), centers, bias, bits, shape), "cuda")
    check("dequantize_packed", (offset(packed, skip), offset(centers.to(dtype), skip), bits, shape), "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-36, 1e-40])
def test_an_infinite_x_gives_the_infinity_of_the_center_s_sign(dtype: torch.dtype, scale: float) -> None:
    """Beside centers in parts: their lower parts have either sign, and inf - inf is NaN."""
    x, packed, centers, _, bits, shape = case((16, 128), 4, 1, 1, dtype)
    x[0, 5] = math.inf
    for sign in (-1.0, 1.0):
        args = (x, packed, sign * (centers.abs() + 0.1) * scale, None, bits, shape)
        outputs = run("lut_linear", OPS["lut_linear"].prepare(*args), "cuda")
        assert outputs is not None
        assert outputs[0].isinf().all()
        assert (outputs[0].sign() == sign).all()


def test_codes_past_the_last_center_take_it() -> None:
    for shape, groups in (((33, 384), 1), ((33, 384), 33), ((9, 37), 1)):
        for dtype in (torch.float32, torch.bfloat16):
            x, packed, centers, bias, bits, sizes = case(shape, 4, groups, 2, dtype, rounded=True)
            few = centers[:, :13].contiguous()
            full = torch.cat([few, few[:, -1:].expand(-1, 3)], 1).contiguous()
            short = run("lut_linear", (x, packed, few, bias, bits, sizes), "cuda")
            long = run("lut_linear", (x, packed, full, bias, bits, sizes), "cuda")
            assert short is not None
            assert long is not None
            assert same_bits(short[0], long[0])


@DTYPES
@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantizing_many_tiles_gives_eager_s_bits(bits: int, dtype: torch.dtype) -> None:
    numel = 3 * (4096 // bits * 8) + 5  # three tiles of a block and some
    rng = torch.Generator().manual_seed(bits)
    for groups in (1, 5):
        n = numel // groups * groups
        codes = torch.randint(0, 1 << bits, (n,), generator=rng, dtype=torch.uint8)
        centers = torch.randn(groups, 1 << bits, generator=rng).to(dtype)
        check("dequantize_packed", (qk.pack_codes(codes, bits), centers, bits, [n]), "cuda")


def test_nothing_is_launched_for_nothing() -> None:
    device = device_of("cuda")
    for batch, out, inputs in ((0, 4, 32), (2, 0, 32), (2, 4, 0), (0, 0, 0)):
        packed = torch.zeros(out * inputs // 2, dtype=torch.uint8, device=device)
        x, bias = torch.ones(batch, inputs, device=device), torch.arange(out, device=device, dtype=torch.float32)
        centers = torch.arange(16.0, device=device)
        with qk.use_backend("cuda"):
            y = qk.lut_linear(x, packed, centers, bias, 4, (out, inputs))
        assert torch.equal(y, bias.expand(batch, out))
