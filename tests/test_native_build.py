"""What the install built and which of it is loaded; threads, forks and the interpreter's exit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from native_modules import BUILT, FLOATS, ISAS, NEEDS_A_BUILD, call, cpp, reference, same_bits, sorted_centers, values

import qupedkern
from qupedkern.backends import _native
from qupedkern.ops._define import OPS

REAL_IMPORT = cpp._import
pytestmark = NEEDS_A_BUILD


@pytest.fixture(params=ISAS)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return cpp._import(request.param)


def _every_kernel(n: int, c: torch.Tensor, dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    x = values(n, c, dtype).nan_to_num(posinf=2.0, neginf=-2.0)
    grad, steep = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype), torch.tensor([3.0])
    codes = reference("assign", x, c)[0]
    bits = (c.shape[-1] - 1).bit_length()
    logits = (x.reshape(len(c.reshape(-1, c.shape[-1])), n), grad.reshape(-1, n), 2.0)
    lists = ([x, x[:0]], [c, sorted_centers(2)], [steep, steep])
    first, t = torch.zeros(x.shape), torch.tensor([0.01])
    step = ([x.float()], [grad.float()], [grad.float().flip(0)], [first], [first.clone()], [c], [steep], [t])
    counts = [torch.arange(3 * c.numel()).reshape(*c.shape[:-1], 3, c.shape[-1])]
    groups = x.numel() // n
    packed = (reference("pack_codes", codes, bits)[0], c, bits, [groups, n])
    indices, looked_up = torch.arange(3 * groups) % groups, grad.reshape(groups, n).repeat(3, 1)
    return {
        "assign": (x, c),
        "center_step": ([c], [c.flip(-1)], counts, [], [t], t, "l1", "counted", 10.0),
        "distance": (x, c, "l2"),
        "distance_backward": (torch.tensor(0.7), x, c, "l1"),
        "foreach_soft_quantize": lists,
        "foreach_soft_quantize_backward": ([grad, grad[:0]], *lists),
        "init_centers": (x[: len(x) // n * min(n, 3000)], 4, len(x) // n, "kmeans", None),
        "prox_centers": (c, x, t, "l1", "exact", None),
        "quped_step": (*step, "soft", "adam", "l2", 0.01, 0.1, 0.9, 0.99, 1e-8, False, 3, False, True, bits),
        "dequantize": (codes, c),
        "dequantize_backward": (grad, codes, c),
        "dequantize_packed": packed,
        "dequantize_packed_backward": (grad.reshape(groups, n), *packed),
        "distillation_loss": logits,
        "distillation_loss_backward": (torch.tensor(0.7), *logits, reference("distillation_loss", *logits)[1]),
        "hard_quantize": (x, c, False),
        "hard_quantize_backward": (grad, x, c, True),
        "lut_linear": (torch.stack([x[:n], grad[:n]]), *packed[:2], torch.ones(groups), *packed[2:]),
        "pack_codes": (codes, bits),
        "packed_embedding": (indices, *packed),
        "packed_embedding_backward": (looked_up, indices, *packed),
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
    info = json.loads(_native.INFO.read_text(encoding="utf-8"))
    assert set(info) == {"version", "python", "cpu", "cpu_note", "compiler", "cuda", "cuda_note"}
    assert info["version"] == qupedkern.__version__
    assert info["cpu"][0] == "baseline"
    assert info["cpu_note"] is None
