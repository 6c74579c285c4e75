"""The native CPU modules: every instruction set that was built, thread counts, forks, and what the install recorded.

The modules are called directly, so that each instruction set is tested on a machine that would only ever load the widest.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import qupedkern
from qupedkern.ops._define import OPS

cpp = importlib.import_module("qupedkern.backends.cpp")
BUILT: list[str] = cpp._info().get("cpu", [])
RUNS_HERE = cpp._import("baseline").supported_instruction_sets() if BUILT else []
ISAS = [isa for isa in BUILT if isa in RUNS_HERE]
REAL_IMPORT = cpp._import
pytestmark = pytest.mark.skipif(not ISAS, reason=f"the native CPU kernels are not here: {cpp.describe()}")

SIZES = [0, 1, 3, 63, 64, 65, 1000, 4097]  # around the lanes, the chunk and the block
LEVELS = [2, 3, 4, 5, 16, 17, 256]
HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *HALVES]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # smallest denormals
LANE_TERMS = 4096 // 16 + 16  # longest chain of float32 additions inside a block


@pytest.fixture(params=ISAS)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return cpp._import(request.param)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, 0xA5 if dtype == torch.uint8 else 12345.0, dtype=dtype)


def call(module: ModuleType, op: str, *args: Any, threads: int = 1) -> tuple[Tensor, ...]:
    """Run one kernel on poisoned outputs shaped by the op's own allocator."""
    made = OPS[op].allocate(*args)
    outputs = made if isinstance(made, tuple) else (made,)
    outputs = tuple(poisoned(*out.shape, dtype=out.dtype) for out in outputs)
    getattr(module, op)(threads, *map(cpp._pass, args), *map(cpp._pass, outputs))
    return outputs


def values(n: int, centers: Tensor, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Weights around the centers, with some exactly on a center, on a midpoint, infinite and NaN (all but one size)."""
    generator = torch.Generator().manual_seed(seed)
    groups = centers.reshape(-1, centers.shape[-1])
    x = torch.randn(groups.shape[0], n, generator=generator) * groups.abs().amax()
    for row, c in zip(x, groups, strict=True):
        special = torch.cat([c, 0.5 * c[:-1] + 0.5 * c[1:], torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])])
        row[1 : 1 + len(special)] = special[: max(n - 1, 0)]
    return x.reshape(-1).to(dtype)


def sorted_centers(m: int, groups: int | None = None, seed: int = 0) -> Tensor:
    shape = (m,) if groups is None else (groups, m)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).sort(-1).values


def reference(op: str, *args: Any) -> tuple[Tensor, ...]:
    out = OPS[op].reference(*args)
    return out if isinstance(out, tuple) else (out,)


def upcast(*args: Any) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, any NaN equal to any other."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    nan = a.isnan() & b.isnan() if a.is_floating_point() else torch.zeros(a.shape, dtype=torch.bool)
    return a.dtype == b.dtype and bool(((a.view(integer) == b.view(integer)) | nan).all())


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


@pytest.mark.parametrize("m", LEVELS)
@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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


@pytest.mark.parametrize("m", LEVELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_centers_belong_to_the_first(module, m, dtype):
    c = sorted_centers(m, 2, seed=m)
    c[0, m // 2 :] = c[0, m // 2]
    c[1] = 0.25
    x = values(200, c, dtype)
    assert torch.equal(call(module, "assign", x, c)[0], reference("assign", x, c)[0])
    assert same_bits(call(module, "hard_quantize", x, c, True)[0], reference("hard_quantize", x, c, True)[0])
    soft = call(module, "soft_quantize", x, c, torch.tensor([30.0]))[0][200:]
    assert bool((soft[~x[200:].isnan()] == 0.25).all())


@pytest.mark.parametrize("m", LEVELS)
@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 37.0, 1e4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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


@pytest.mark.parametrize("m", LEVELS)
@pytest.mark.parametrize("sharpness", [1e-3, 1.0, 37.0, 1e4])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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


@pytest.mark.parametrize("m", LEVELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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


@pytest.mark.parametrize(
    ("op", "args", "sentence"),
    [
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


def _every_kernel(n: int, c: Tensor, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    x = values(n, c, dtype).nan_to_num(posinf=2.0, neginf=-2.0)
    grad, steep = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype), torch.tensor([3.0])
    codes = reference("assign", x, c)[0]
    bits = (c.shape[-1] - 1).bit_length()
    return {
        "assign": (x, c),
        "dequantize": (codes, c),
        "dequantize_backward": (grad, codes, c),
        "hard_quantize": (x, c, False),
        "hard_quantize_backward": (grad, x, c, True),
        "pack_codes": (codes, bits),
        "prox_weights": (x, c, torch.tensor([0.1]), "l1"),
        "soft_quantize": (x, c, steep),
        "soft_quantize_backward": (grad, x, c, steep),
        "unpack_codes": (reference("pack_codes", codes, bits)[0], bits, tuple(x.shape)),
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("groups", "n", "m"), [(1, 600_001, 4), (1, 70_003, 17), (3, 50_001, 5), (999, 65, 16), (70, 8200, 2)]
)
def test_the_number_of_threads_changes_no_bit(module, groups, n, m, dtype):
    for op, args in _every_kernel(n, sorted_centers(m, groups), dtype).items():
        one = call(module, op, *args)
        for threads in (2, 3, 16):
            for a, b in zip(one, call(module, op, *args, threads=threads), strict=True):
                assert same_bits(a, b), (op, threads)


def test_every_kernel_is_in_the_list_and_names_an_op(module):
    assert set(_every_kernel(8, sorted_centers(4), torch.float32)) == set(module.KERNELS)
    assert set(module.KERNELS) <= set(OPS)


def test_calls_from_many_python_threads_do_not_disturb_one_another(module):
    c = sorted_centers(4)
    cases = [values(200_000 + i, c, seed=i) for i in range(4)]
    steep = torch.tensor([5.0])
    expected = [call(module, "soft_quantize", x, c, steep)[0] for x in cases]
    right: list[bool] = []

    def work(i: int) -> None:
        for _ in range(20):
            right.append(same_bits(call(module, "soft_quantize", cases[i], c, steep, threads=3)[0], expected[i]))  # noqa: PERF401

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True] * 80


def test_an_error_inside_a_task_leaves_the_pool_working(module):
    codes = torch.zeros(400_000, dtype=torch.uint8)
    codes[123_456] = 200
    for _ in range(10):
        with pytest.raises(ValueError, match=r"^dequantize: codes must be below m = 4, got 200$"):
            call(module, "dequantize", codes, torch.arange(4.0), threads=3)
    codes[123_456] = 3
    assert call(module, "dequantize", codes, torch.arange(4.0), threads=3)[0].sum() == 3


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(qupedkern.__file__).resolve().parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "2", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env, check=False
    )


FORK = """
import importlib, os, torch
cpp = importlib.import_module("qupedkern.backends.cpp")
x, c, out = torch.randn(500_000), torch.tensor([-1.0, 1.0]), torch.empty(500_000)
def run():
    cpp.launch("hard_quantize", (x, c, False), (out,))
    return hash(out.numpy().tobytes())  # not a torch op: torch's own threads do not survive a fork
expected = run()
for _ in range(5):
    child = os.fork()
    if child == 0:
        out.numpy().fill(0.0)
        os._exit(0 if run() == expected and run() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert run() == expected
print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason=f"{sys.platform} cannot fork")
def test_a_forked_child_computes_and_the_parent_goes_on():
    done = run_python(FORK, PYTHONWARNINGS="ignore::DeprecationWarning")
    assert (done.stdout, done.returncode) == ("same\n", 0), done.stderr


def test_the_interpreter_exits_while_a_worker_is_busy():
    code = """
import importlib, threading, torch
cpp = importlib.import_module("qupedkern.backends.cpp")
x, c, p, out = torch.randn(3_000_000), torch.linspace(-1, 1, 64), torch.ones(1), torch.empty(3_000_000)
threading.Thread(target=lambda: cpp.launch("soft_quantize", (x, c, p), (out,)), daemon=True).start()
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The backend as a new process finds it: nothing chosen, nothing loaded, no instruction set asked for."""
    monkeypatch.delenv("QUPEDKERN_ISA", raising=False)
    cached = (cpp.unavailable, cpp._loaded, cpp._kernels)
    for function in cached:
        function.cache_clear()
    yield monkeypatch
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_forces_an_instruction_set(fresh, isa):
    fresh.setenv("QUPEDKERN_ISA", isa)
    assert cpp.unavailable() is None
    assert cpp._loaded() == (isa, cpp._import(isa))
    assert cpp.describe().startswith(f"{isa} (built: {', '.join(BUILT)}; ")


def test_the_widest_instruction_set_is_the_default(fresh):
    fresh.setenv("QUPEDKERN_ISA", "")
    assert cpp._loaded()[0] == ISAS[-1]


def test_an_unknown_instruction_set_is_refused_with_the_choices(fresh):
    fresh.setenv("QUPEDKERN_ISA", "avx1024")
    with pytest.raises(ValueError, match=r"^QUPEDKERN_ISA must be one of baseline, avx2, avx512, got 'avx1024'$"):
        cpp.unavailable()


def test_an_instruction_set_that_was_not_built_is_refused(fresh):
    fresh.setenv("QUPEDKERN_ISA", "avx2")
    fresh.setattr(cpp, "_info", lambda: {"cpu": ["baseline"], "compiler": "g++"})
    sentence = "QUPEDKERN_ISA=avx2: this install built baseline only; choose one of those or build again"
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        cpp.unavailable()


def _narrow_processor(isa: str) -> ModuleType | SimpleNamespace:
    real = REAL_IMPORT(isa)
    return SimpleNamespace(supported_instruction_sets=lambda: ["baseline"]) if isa == "baseline" else real


def test_an_instruction_set_that_does_not_run_here_is_refused(fresh):
    fresh.setenv("QUPEDKERN_ISA", "avx512")
    fresh.setattr(cpp, "_info", lambda: {"cpu": ["baseline", "avx2", "avx512"], "compiler": "g++"})
    fresh.setattr(cpp, "_import", _narrow_processor)
    with pytest.raises(
        RuntimeError, match=r"^QUPEDKERN_ISA=avx512: this processor runs baseline only; choose one of those$"
    ):
        cpp.unavailable()


def test_without_a_build_the_reason_is_told_and_a_forced_set_raises(fresh):
    fresh.setattr(cpp, "_info", lambda: {"cpu": [], "cpu_note": "no C++ compiler was found"})
    assert cpp.unavailable() == cpp.describe() == "not built: no C++ compiler was found"
    assert cpp.ops() == ()
    cpp.unavailable.cache_clear()
    fresh.setenv("QUPEDKERN_ISA", "baseline")
    with pytest.raises(
        RuntimeError, match=r"^QUPEDKERN_ISA=baseline: .* cannot run: not built: no C\+\+ compiler was found$"
    ):
        cpp.unavailable()


def test_a_module_that_was_built_but_does_not_load_raises(fresh):
    wide = SimpleNamespace(supported_instruction_sets=lambda: ["baseline", "sse9"])
    fresh.setattr(cpp, "_ISAS", ("baseline", "sse9"))
    fresh.setattr(cpp, "_info", lambda: {"cpu": ["baseline", "sse9"], "compiler": "g++"})
    fresh.setattr(cpp, "_import", lambda isa: wide if isa == "baseline" else REAL_IMPORT(isa))
    sentence = "the native module for sse9 was built but does not load: No module named 'qupedkern._C_cpu_sse9'"
    with pytest.raises(ImportError, match=sentence):
        cpp.unavailable()
    assert sentence in cpp.describe()


def test_importing_the_package_loads_nothing_native():
    code = "import sys, qupedkern; print([name for name in sys.modules if '_C_' in name and 'qupedkern' in name])"
    assert run_python(code).stdout == "[]\n"


def test_the_install_recorded_what_it_built():
    info = json.loads(Path(cpp._INFO).read_text(encoding="utf-8"))
    assert set(info) == {"version", "python", "cpu", "cpu_note", "compiler", "cuda", "cuda_note"}
    assert info["version"] == qupedkern.__version__
    assert info["cpu"][0] == "baseline"
    assert info["cpu_note"] is None
