"""soft_quantize and its gradient in CUDA, where they run: on a GPU, or emulated in the process that tests/test_cuda.py starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qupedkern.backends import has_kernel, module
from qupedkern.ops import OPS
from qupedkern.testing.harness import check, run, same_bits, upcast
from qupedkern.testing.soft_tolerances import arithmetic_of
from qupedkern.testing.tolerances import BOUNDS, ROUNDOFF, SECOND_ORDER, SMALLEST, assert_close

pytestmark = pytest.mark.skipif(
    not has_kernel("cuda", "soft_quantize"), reason="needs an NVIDIA GPU, or the emulator of tests/test_cuda.py"
)
N = 7300  # emulated: spans of two tiles, the last of them ragged; a GPU has a block for each tile
SLOTS = 8192  # elements of those tiles
STEEP = (1.0, 4.9, 6.0, 8.1, 8.3, 10.0, 16.0, 40.0, 3e3)  # P times the smallest distance of two midpoints
THRESHOLD = -0.5 * math.log(4 / 3 * 2.0**-24)  # of the gradient: 3 exp(-2 P gap) <= 4 u
WINDOWED = (5, 8, 16, 17, 37)  # the gradient's window: from so many centers to so many
MORE = (2, 3, 38, 256)


def rows_of_centers(m: int) -> list[Tensor]:
    """Even, uneven, with two equal ones, and off zero by far more than they are apart."""
    uneven = (torch.rand(m, generator=torch.Generator().manual_seed(m)) + 0.3).cumsum(0)
    return [torch.linspace(-1, 1, m), uneven - 1, torch.cat([uneven[:-1], uneven[-2:-1]]), uneven + 50]


def midpoints(c: Tensor) -> Tensor:
    return 0.5 * c[:-1] + 0.5 * c[1:]


def gap_of(c: Tensor) -> float:
    """The smallest distance of two midpoints; where there is none the largest of two centers, or 1."""
    gaps = midpoints(c.double()).diff()
    return float(gaps.min()) if len(gaps) and float(gaps.min()) > 0 else float(c.diff().max()) or 1.0


def weights(c: Tensor, seed: int = 0) -> Tensor:
    """All over the centers and past them, infinities, zeros, each center and each midpoint."""
    m, reach = len(c), 3 * float(c.diff().max())
    rng = torch.Generator().manual_seed(seed)
    x = torch.empty(N).uniform_(float(c[0]) - reach, float(c[-1]) + reach, generator=rng)
    x[:4] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    x[4 : 4 + m] = c
    x[4 + m : 3 + 2 * m] = midpoints(c)
    return x


def gradient(seed: int = 1) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed))


def at(c: Tensor, steep: float) -> Tensor:
    return torch.tensor([steep / gap_of(c)])


@pytest.mark.parametrize("m", [3, *WINDOWED])
def test_every_way_to_the_sum_holds_its_bound_from_flat_to_steep(m: int) -> None:
    """Shared exponentials, one a midpoint, two midpoints alone: by sharpness times the distance of centers."""
    for c in rows_of_centers(m):
        x = torch.cat([weights(c), torch.tensor([torch.nan])])
        for steep in STEEP:
            for dtype in (torch.float32, torch.bfloat16):
                check("soft_quantize", (x.to(dtype), c, at(c, steep)), "cuda")


@pytest.mark.parametrize("m", [*WINDOWED, *MORE])
def test_every_way_to_the_gradient_holds_its_bound_from_flat_to_steep(m: int) -> None:
    for c in rows_of_centers(m):
        x, g = weights(c), gradient()
        for steep in STEEP if m < 100 else STEEP[::3]:
            check("soft_quantize_backward", (g, x, c, at(c, steep)), "cuda")
        for dtype in (torch.bfloat16, torch.float16):
            check("soft_quantize_backward", (g.to(dtype), x.to(dtype), c, at(c, 10.0)), "cuda")


def expect_centers(got: Tensor, what: str, *args: Tensor) -> None:
    wide = upcast(args)
    with arithmetic_of("cuda"):
        u, eta = ROUNDOFF[torch.float32], SMALLEST[torch.float32]
        bound = BOUNDS["soft_quantize_backward"](*wide, u=u, eta=eta)[1] * SECOND_ORDER
    assert_close(got, OPS["soft_quantize_backward"].reference(*wide)[1], bound, what)


@pytest.mark.parametrize("m", WINDOWED)
def test_centers_far_from_every_weight_have_their_gradient_to_its_last_digits(m: int) -> None:
    """Four weights beside one midpoint; those without a gradient add nothing, so the bound is that of a sum of four.

    Turned round, -x among -c has the same gradients in reverse. Bounds, and the reference itself, allow for 1 - s where s is
    near 1; the window has no such difference and holds both.
    """
    some = slice(3000, 3004)
    for c in rows_of_centers(m):
        x, g = weights(c), torch.zeros(N)
        g[some] = torch.tensor([1.0, 0.5, 1.5, 2.0])
        for place in {0, m // 2, m - 2}:
            x[some] = midpoints(c)[place] + torch.tensor([-0.4, -0.001, 0.001, 0.3]) * gap_of(c)
            for steep in STEEP:
                sharpness = at(c, steep)
                got = run("soft_quantize_backward", (g, x, c, sharpness), "cuda")
                assert got is not None
                what = f"centers at {steep}, weights beside midpoint {place}"
                expect_centers(got[1], what, g[some], x[some], c, sharpness)
                if steep > THRESHOLD:
                    expect_centers(got[1].flip(0), what, g[some], -x[some], -c.flip(0), sharpness)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_nan_reaches_the_gradient_of_every_center_and_no_other_weight(wrong: float) -> None:
    for m in WINDOWED:
        c = torch.linspace(-1, 1, m)
        for steep in (4.0, 9.0):
            for place in (2, 4097, N - 1):
                x, g = weights(c), gradient()
                x[place] = wrong
                check("soft_quantize_backward", (g, x, c, at(c, steep)), "cuda")
                g[place] = math.nan
                got = run("soft_quantize_backward", (g, x, c, at(c, steep)), "cuda")
                assert got is not None
                assert got[0].isnan().nonzero().tolist() == [[place]]
                assert got[1].isnan().all()


def emulator() -> Any:
    loaded = module("cuda")._loaded()  # type: ignore[attr-defined]
    if not hasattr(loaded, "set_order"):
        pytest.skip("a GPU neither counts its special functions nor is told an order of threads")
    return loaded


def special_functions(call: Callable[[], object]) -> int:
    before = emulator().special_functions()
    call()
    return int(emulator().special_functions() - before)


def backward(c: Tensor, sharpness: Tensor, x: Tensor | None = None) -> int:
    x = weights(c.reshape(-1, c.shape[-1])[0]) if x is None else x
    g = gradient()[: x.numel()]
    return special_functions(lambda: run("soft_quantize_backward", (g, x, c, sharpness), "cuda"))


def fewest(m: int) -> int:
    """Special functions an element from all midpoints: a reciprocal each and an exponential for three."""
    return m - 1 + (m + 1) // 3


@pytest.mark.parametrize("m", WINDOWED)
def test_the_gradient_looks_at_two_midpoints_an_element_from_its_threshold_on(m: int) -> None:
    for c in rows_of_centers(m)[:2]:
        for steep in (1.001 * THRESHOLD, 10.0, 3e3):
            assert backward(c, at(c, steep)) == 4 * SLOTS  # two exponentials, two reciprocals
        for steep in (1.0, 5.0, 0.999 * THRESHOLD):
            assert backward(c, at(c, steep)) >= fewest(m) * SLOTS


def test_the_gradient_looks_at_all_midpoints_where_the_window_is_not_worth_its_tables() -> None:
    for m in (4, 38):
        c = torch.linspace(-1, 1, m)
        assert backward(c, at(c, 30.0)) >= fewest(m) * SLOTS
    c = torch.linspace(-1, 1, 16)
    assert backward(c, at(c, 30.0), weights(c)[:1024]) >= fewest(16) * 1024


def test_each_row_of_centers_decides_for_itself() -> None:
    c = torch.linspace(-1, 1, 16).repeat(2, 1)
    flat, steep = float(at(c[0], 4.0)), float(at(c[0], 12.0))

    def functions(*sharpness: float) -> int:
        return backward(c, torch.tensor(sharpness))  # four tiles of each row: two spans

    assert functions(steep, steep) == 4 * SLOTS
    assert functions(flat, steep) == functions(steep, flat) == (functions(flat, flat) + functions(steep, steep)) // 2
    for sharpness in ((flat, steep), (steep, flat)):
        check("soft_quantize_backward", (gradient(), weights(c[0]), c, torch.tensor(sharpness)), "cuda")


@pytest.mark.parametrize("m", [5, 16])
def test_rows_of_one_span_each_hold_the_bounds_flat_and_steep_side_by_side(m: int) -> None:
    """So many rows that each has a block to itself, also on a GPU, where a row alone must be long to have spans of two tiles."""
    count = 6 if hasattr(module("cuda")._loaded(), "set_order") else 1100  # type: ignore[attr-defined]
    length, base = 2100, torch.linspace(-1, 1, m)
    c = base * torch.linspace(0.5, 2.0, count)[:, None]
    steep = torch.tensor([4.0, 9.0, 30.0, 7.0, 12.0]).repeat(count)[:count]
    x = (weights(base)[:length] * c[:, -1:]).contiguous()
    g = gradient()[:length].repeat(count, 1) * torch.linspace(1.0, 3.0, count)[:, None]
    sharpness = steep / (c[:, 1] - c[:, 0])
    check("soft_quantize", (x, c, sharpness), "cuda")
    check("soft_quantize_backward", (g, x, c, sharpness), "cuda")


def test_the_order_in_which_threads_run_changes_no_bit_of_the_gradient() -> None:
    found = []
    try:
        for order in ("forward", "backward", "shuffled"):
            emulator().set_order(order, 5)
            found.append([])
            for m in WINDOWED:
                c = torch.linspace(-1, 1, m)
                for steep in (4.0, 9.0):
                    found[-1] += run("soft_quantize_backward", (gradient(), weights(c), c, at(c, steep)), "cuda") or ()
    finally:
        emulator().set_order("forward", 0)
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))
