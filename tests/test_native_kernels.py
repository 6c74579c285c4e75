"""Each native kernel, on every instruction set that runs here, against the reference: to the bit, or within a derived bound."""

from __future__ import annotations

import re
from types import ModuleType

import pytest
import torch
from native_modules import (
    HALVES,
    ISAS,
    NEEDS_A_BUILD,
    call,
    cpp,
    reference,
    same_bits,
    sorted_centers,
    upcast,
    values,
)
from torch import Tensor

from qupedkern.ops import OPS

pytestmark = NEEDS_A_BUILD

SIZES = [0, 1, 3, 63, 64, 65, 1000, 4097]  # around the lanes, the chunk and the block
LEVELS = [2, 3, 4, 5, 16, 17, 256]
CASES = [(m, torch.float32) for m in LEVELS] + [(m, half) for m in (3, 17) for half in HALVES]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # smallest denormals
LANE_TERMS = 4096 // 16 + 16  # longest chain of float32 additions inside a block


@pytest.fixture(params=ISAS)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return cpp._import(request.param)


def within(got: Tensor, expected: Tensor, bound: Tensor) -> Tensor:
    """Where both are NaN, or they differ by at most the bound."""
    return (got.isnan() & expected.isnan()) | (got.double() == expected) | ((got.double() - expected).abs() <= bound)


class Conditioning:
    """Per row [G, 1] and element [G, n, m - 1], in float64: how an error of a unit roundoff in P (x - t_j) travels."""

    def __init__(self, x: Tensor, centers: Tensor, sharpness: Tensor) -> None:
        self.c = centers.double().reshape(-1, centers.shape[-1])
        self.x = x.double().reshape(self.c.shape[0], -1, 1)
        self.p = sharpness.double().reshape(-1, 1, 1)
        self.d = self.c.diff(dim=1)[:, None, :]
        t = (0.5 * self.c[:, :-1] + 0.5 * self.c[:, 1:])[:, None, :]
        z = self.p * (self.x - t)
        self.s, self.slope = torch.sigmoid(z), torch.sigmoid(z) * torch.sigmoid(-z)
        # x - t and P (x - t) are rounded once each and t once; where x is infinite nothing is lost
        error = UNIT[torch.float32] * self.p * (2 * (self.x - t).abs() + t.abs())
        self.shift = torch.where(self.x.isinf(), torch.zeros_like(error), error)
        self.value_error = (self.shift / 4).clamp(max=1.0)  # |ds/dz| <= 1/4
        self.slope_error = (self.shift * 0.0963).clamp(max=0.25) + 8 * UNIT[
            torch.float32
        ] * self.slope  # <= 1/(6 sqrt 3)


def soft_bound(x: Tensor, centers: Tensor, sharpness: Tensor) -> Tensor:
    """4 u (m max|c|): m rounded terms, exp and a division each; plus each term's share of its argument's error."""
    k, u = Conditioning(x, centers, sharpness), UNIT[torch.float32]
    bound = 4 * u * centers.shape[-1] * k.c.abs().amax(1, keepdim=True) + (k.d * k.value_error).sum(-1)
    return (bound + centers.shape[-1] * TINY[torch.float32]).reshape(x.shape)


def gradient_bounds(grad: Tensor, x: Tensor, centers: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    """grad_x: |g| P sum_j d_j (error of b_j + m u b_j); grad_c_k: the like per element, summed, and the summation itself."""
    k, u = Conditioning(x, centers, sharpness), UNIT[torch.float32]
    g = grad.double().reshape(k.x.shape[:2]).abs()
    m = centers.shape[-1]
    grad_x = g * (k.p * k.d * (k.slope_error + (m + 4) * u * k.slope)).sum(-1)
    edge = torch.zeros_like(k.x)
    per_midpoint = k.value_error + 8 * u * k.s + k.p / 2 * k.d * (k.slope_error + 8 * u * k.slope)
    padded = torch.cat([edge + 8 * u, per_midpoint, edge], dim=-1)  # s_1 = 1 exactly, but the difference is rounded
    size = torch.cat([edge + 1, k.s + k.p / 2 * k.d * k.slope, edge], dim=-1)
    each = padded[..., :-1] + padded[..., 1:] + LANE_TERMS * u * (size[..., :-1] + size[..., 1:])
    return grad_x.reshape(x.shape) + TINY[torch.float32], (g[..., None] * each).sum(1).reshape(centers.shape)


def rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    return UNIT[dtype] * expected.abs() + TINY[dtype]


@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize(("m", "dtype"), CASES, ids=str)
def test_assign_hard_and_prox_equal_the_reference_to_the_bit(module, m, groups, dtype):
    c = sorted_centers(m, groups, seed=m)
    strength = torch.tensor([0.07])
    for n in SIZES:
        x = values(n, c, dtype)
        assert torch.equal(call(module, "assign", x, c)[0], reference("assign", x, c)[0]), n
        assert same_bits(call(module, "hard_quantize", x, c, False)[0], reference("hard_quantize", x, c, False)[0]), n
        for norm in ("l1", "l2"):
            got, expected = (
                run("prox_weights", x, c, strength, norm)[0] for run in (lambda *a: call(module, *a), reference)
            )
            assert same_bits(got, expected), (n, norm)


@pytest.mark.parametrize(("m", "dtype"), CASES, ids=str)
def test_equal_centers_belong_to_the_first(module, m, dtype):
    c = sorted_centers(m, 2, seed=m)
    c[0, m // 2 :] = c[0, m // 2]
    c[1] = 0.25
    x = values(200, c, dtype)
    assert torch.equal(call(module, "assign", x, c)[0], reference("assign", x, c)[0])
    assert same_bits(call(module, "hard_quantize", x, c, True)[0], reference("hard_quantize", x, c, True)[0])
    soft = call(module, "soft_quantize", x, c, torch.tensor([30.0]))[0][200:]
    assert bool((soft[~x[200:].isnan()] == 0.25).all())


@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 37.0, 1e4])
@pytest.mark.parametrize(("m", "dtype"), CASES, ids=str)
def test_soft_quantize_is_within_its_bound(module, m, sharpness, dtype):
    c = sorted_centers(m, 2, seed=m)
    steep = torch.tensor([sharpness, 2 * sharpness])
    for n in SIZES[:-1]:
        x = values(n, c, dtype)
        (expected,) = reference("soft_quantize", *upcast(x, c, steep))
        (got,) = call(module, "soft_quantize", x, c, steep)
        bound = soft_bound(x, c, steep)
        bound = bound + rounding(expected.abs() + bound, dtype) if dtype != torch.float32 else bound
        assert bool(within(got, expected, bound).all()), n
        inf = x.reshape(2, -1) == torch.inf
        assert bool((got.reshape(2, -1) == c[:, -1:].to(dtype))[inf].all())


def test_the_sigmoid_and_its_slope_are_good_to_the_last_places(module):
    # Centers 0 and 1: S is the sigmoid itself, dS/dx its slope, and z = x - 1/2 is exact. P log2(e) is rounded once, and its
    # product with x where it is not fused: u |z| each. exp within 1.5 ulp = 3 u, 1 + e and the reciprocal u each, the slope
    # two products more. Neither falls below 2^-64 before x is so far out that S is a center.
    c, steep = torch.tensor([0.0, 1.0]), torch.tensor([1.0])
    x = torch.arange(-86 * 512, 86 * 512) / 512
    s = torch.sigmoid(x.double() - 0.5)
    slope = s * torch.sigmoid(0.5 - x.double())
    (soft,) = call(module, "soft_quantize", x, c, steep)
    grad_x, _ = call(module, "soft_quantize_backward", torch.ones_like(x), x, c, steep)
    u, z = UNIT[torch.float32], (x.double() - 0.5).abs()
    assert bool(((soft.double() - s).abs() <= (5 + 2 * z) * u * s + 2.0**-64).all())
    assert bool(((grad_x.double() - slope).abs() <= (7 + 2 * z) * u * slope + 2.0**-64).all())


def test_the_sum_of_rounded_terms_never_leaves_the_range_of_the_centers(module):
    c = sorted_centers(17, 500)
    x = torch.tensor([-1e30, -9.0, 9.0, 1e30]).repeat(500)
    soft = call(module, "soft_quantize", x, c, torch.tensor([50.0]))[0].reshape(500, 4)
    assert bool(((soft >= c[:, :1]) & (soft <= c[:, -1:])).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_read_exactly_and_written_to_nearest_even(module, dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    (same,) = call(module, "prox_weights", every, torch.zeros(2), torch.zeros(1), "l1")  # strength 0 is the identity
    assert bool(((same == every) | (same.isnan() & every.isnan())).all())
    finite = every[every.isfinite()].float().unique()
    ties = 0.5 * finite[:-1] + 0.5 * finite[1:]
    up, down = (ties.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf))
    written = torch.cat([finite, ties, up, down])
    centers = written[:, None].expand(-1, 2).contiguous()  # a row for each value
    (got,) = call(module, "hard_quantize", torch.zeros(len(written), dtype=dtype), centers, False)
    assert torch.equal(got, written.to(dtype))


def test_sums_across_blocks_are_carried_in_float64(module):
    n = 3_000_000
    grad = torch.zeros(n)
    grad[0], grad[-1] = 2.0**40, -(2.0**40)
    grad[100_000:2_900_000:100_000] = 1.0  # lost beside 2^40 in float32
    codes, c = torch.zeros(n, dtype=torch.uint8), torch.arange(2.0)
    assert call(module, "dequantize_backward", grad, codes, c, threads=2)[0].tolist() == [28.0, 0.0]
    assert call(module, "hard_quantize_backward", grad, torch.zeros(n), c, False)[1].tolist() == [28.0, 0.0]
    grad_c = call(module, "soft_quantize_backward", grad, torch.full((n,), -9.0), c, torch.tensor([1e3]))[1]
    assert grad_c[0] == 28.0
    assert abs(float(grad_c[1])) <= 28 * 1e3 * 2.0**-64  # 28 P h, and h stops at 2^-64


@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 37.0, 1e4])
@pytest.mark.parametrize(("m", "dtype"), CASES, ids=str)
def test_soft_gradients_are_within_their_bounds(module, m, sharpness, dtype):
    c = sorted_centers(m, 2, seed=m)
    steep = torch.tensor([sharpness, 2 * sharpness])
    for n in SIZES[:-1] if m < 256 else (0, 1, 65, 300):
        x = values(n, c, dtype).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        expected_x, expected_c = reference("soft_quantize_backward", *upcast(grad, x.nan_to_num(), c, steep))
        grad_x, grad_c = call(module, "soft_quantize_backward", grad, x, c, steep)
        bound_x, bound_c = gradient_bounds(grad, x, c, steep)
        if dtype != torch.float32:
            bound_x = bound_x + rounding(expected_x.abs() + bound_x, dtype)
        assert bool(within(grad_x, expected_x, bound_x).all()), n
        assert bool(within(grad_c, expected_c, bound_c + rounding(expected_c, torch.float32)).all()), n
        assert bool((grad_x[x.isinf()] == 0).all()), n


def test_a_nan_reaches_its_own_gradient_and_its_rows_centers_only(module):
    c = sorted_centers(4, 2)
    x = torch.randn(40)
    x[3] = torch.nan
    grad_x, grad_c = call(module, "soft_quantize_backward", torch.ones(40), x, c, torch.tensor([5.0]))
    assert grad_x.isnan().nonzero().tolist() == [[3]]
    assert grad_c.isnan().tolist() == [[True] * 4, [False] * 4]


@pytest.mark.parametrize(("m", "dtype"), CASES, ids=str)
def test_sums_by_code_are_within_the_bound_of_a_blocked_sum(module, m, dtype):
    c = sorted_centers(m, 3, seed=m)
    for n in SIZES:
        x = values(n, c, dtype)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        codes = reference("assign", x, c)[0]
        cases = [("dequantize_backward", (grad, codes, c))]
        cases += [("hard_quantize_backward", (grad, x, c, through)) for through in (False, True)]
        for op, args in cases:
            *others, got = call(module, op, *args)
            *expected_others, _ = reference(op, *args)
            # by the float32 codes: in float64 the midpoints are others, and so are the cells of weights on them
            (expected,) = reference("dequantize_backward", *upcast(grad, codes, c))
            (absolute,) = reference("dequantize_backward", *upcast(grad.abs(), codes, c))
            assert bool(within(got, expected, LANE_TERMS * UNIT[torch.float32] * absolute).all()), (op, n)
            assert all(torch.equal(a, b) for a, b in zip(others, expected_others, strict=True)), (op, n)


@pytest.mark.parametrize("m", LEVELS)
@pytest.mark.parametrize("groups", [None, 3])
def test_dequantize_looks_up_every_code(module, m, groups):
    c = sorted_centers(m, groups, seed=m)
    for n in SIZES:
        codes = torch.randint(0, m, ((groups or 1) * n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        assert torch.equal(call(module, "dequantize", codes, c)[0], reference("dequantize", codes, c)[0])


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_equals_the_reference_and_unpacking_inverts_it(module, bits):
    for n in [*range(20), 255, 256, 257, 40000]:
        codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        (packed,) = call(module, "pack_codes", codes, bits, threads=2)
        assert torch.equal(packed, reference("pack_codes", codes, bits)[0])
        assert torch.equal(call(module, "unpack_codes", packed, bits, (n,), threads=2)[0], codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_packed_weights_are_read_from_any_code_on_and_not_past_their_end(module, bits, dtype):
    for width in (1, 3, 8, 17, 65):  # rows that start inside a byte, unless bits * width is a multiple of 8
        table, m = torch.arange(7 * width) % 2**bits, 2**bits
        for groups in (None, 7, 7 * width):
            c = sorted_centers(m, groups, seed=bits).to(dtype)
            codes = table.to(torch.uint8).reshape(7, width)
            (packed,) = reference("pack_codes", codes, bits)
            guarded = torch.full((packed.numel() + 64,), 0xFF, dtype=torch.uint8)  # what follows must not matter
            guarded[: packed.numel()] = packed
            expected = c[codes.long()] if groups is None else reference("dequantize", codes, c)[0]
            args = (guarded[: packed.numel()], c, bits, [7, width])
            assert torch.equal(call(module, "dequantize_packed", *args)[0], expected)
            index = torch.tensor([6, 0, 3, 3, 5])
            assert torch.equal(call(module, "packed_embedding", index, *args, threads=2)[0], expected[index])


def test_gradients_of_a_packed_weight_are_those_of_its_codes_to_the_bit(module):
    for m, bits, groups, n in ((4, 2, None, 70_001), (3, 2, 3, 4097), (17, 5, 5, 333), (256, 8, 2, 9000)):
        c = sorted_centers(m, groups)
        codes = torch.randint(0, m, ((groups or 1) * n,), dtype=torch.uint8)
        grad = torch.randn(codes.shape)
        (packed,) = reference("pack_codes", codes, bits)
        (expected,) = call(module, "dequantize_backward", grad, codes, c)
        for threads in (1, 2):
            args = (grad, packed, c, bits, list(codes.shape))
            assert same_bits(call(module, "dequantize_packed_backward", *args, threads=threads)[0], expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_wrong_code_or_index_is_told_before_anything_is_written(module, threads):
    n, m = 200_000, 3
    codes, c, index = torch.ones(n, dtype=torch.uint8), torch.arange(3.0), torch.arange(2000) % 100
    (good,) = reference("pack_codes", codes, 2)
    codes[-1] = 3
    (packed,) = reference("pack_codes", codes, 2)
    grad, shape, table = torch.ones(n), [n], [100, 2000]
    rows = torch.ones(2000, 2000)
    wrong_index = index.clone()
    wrong_index[-1] = 100
    codes_sentence = f"codes must be below m = {m}, got 3"
    for op, args, sentence in (
        ("dequantize", (codes, c), codes_sentence),
        ("dequantize_backward", (grad, codes, c), codes_sentence),
        ("dequantize_packed", (packed, c, 2, shape), codes_sentence),
        ("dequantize_packed_backward", (grad, packed, c, 2, shape), codes_sentence),
        ("packed_embedding", (index, packed, c, 2, table), codes_sentence),
        ("packed_embedding", (wrong_index, good, c, 2, table), "indices must be from 0 to 99, got 100"),
        ("packed_embedding", (-wrong_index, good, c, 2, table), "indices must be from 0 to 99, got -1"),
        ("packed_embedding_backward", (rows, index, packed, c, 2, table), codes_sentence),
        ("packed_embedding_backward", (rows, wrong_index, good, c, 2, table), "indices must be from 0 to 99, got 100"),
    ):
        out = torch.full_like(OPS[op].allocate(*args), 12345.0)
        with pytest.raises(ValueError, match=f"^{op}: {sentence}$"):
            getattr(module, op)(threads, *map(cpp._pass, args), cpp._pass(out))
        assert bool((out == 12345.0).all()), op


@pytest.mark.parametrize(
    ("op", "args", "sentence"),
    [
        (
            "dequantize_packed",
            (torch.zeros(3, dtype=torch.uint8), torch.zeros(5), 2, [12]),
            "dequantize_packed: 2 bits tell 4 centers apart, got rows of 5",
        ),
        (
            "dequantize",
            (torch.tensor([0, 7, 4], dtype=torch.uint8), torch.zeros(4)),
            "dequantize: codes must be below m = 4, got 7",
        ),
        (
            "dequantize",
            (torch.full((999,), 255, dtype=torch.uint8), torch.zeros(17)),
            "dequantize: codes must be below m = 17, got 255",
        ),
        (
            "dequantize_backward",
            (torch.zeros(3), torch.tensor([0, 7, 4], dtype=torch.uint8), torch.zeros(4)),
            "dequantize_backward: codes must be below m = 4, got 7",
        ),
        (
            "pack_codes",
            (torch.tensor([1, 9, 8], dtype=torch.uint8), 3),
            "pack_codes: codes must be below 2**3 = 8, got 9",
        ),
        ("pack_codes", (torch.zeros(3, dtype=torch.uint8), 9), "pack_codes: bits must be between 1 and 8, got 9"),
        (
            "prox_weights",
            (torch.zeros(3), torch.zeros(2), torch.zeros(1), "l3"),
            "prox_weights: norm must be 'l1' or 'l2', got 'l3'",
        ),
        (
            "assign",
            (torch.zeros(3), torch.zeros(2, 2)),
            "assign: the rows of centers must divide the number of elements evenly, got 2 rows for 3 elements",
        ),
        (
            "soft_quantize",
            (torch.zeros(4), torch.zeros(2, 2), torch.zeros(3)),
            "soft_quantize: sharpness must have shape [1] or [2], got shape (3,)",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_a_sentence(module, op, args, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        call(module, op, *args)


def test_types_a_kernel_does_not_state_are_refused(module):
    x, c, codes = torch.zeros(4), torch.zeros(2), torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^assign: x must be float32 or bfloat16 or float16, got uint8$"):
        module.assign(1, *map(cpp._pass, (codes, c, codes)))
    with pytest.raises(ValueError, match=r"^hard_quantize: out must be float32, got bfloat16$"):
        module.hard_quantize(1, cpp._pass(x), cpp._pass(c), False, cpp._pass(x.bfloat16()))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        module.assign(1, (x.data_ptr(), (4,), 99), cpp._pass(c), cpp._pass(codes))
    assert cpp.refusal("assign", (x.double(), c)) == "x must be float32 or bfloat16 or float16, got float64"
    assert cpp.refusal("hard_quantize", (x, c.to("meta"), False)) == "centers must be on the CPU, got meta"
    assert cpp.refusal("hard_quantize", (x, c, False)) is None
