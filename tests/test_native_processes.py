"""Native kernels in a living process: thread counts that change, callers on other threads, worker processes, second imports."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import threading

import pytest
import torch
from native_modules import NEEDS_A_BUILD, cpp, same_bits, sorted_centers, values
from test_native_build import run_python
from torch import Tensor

import qupedkern as qk
from qupedkern.backends import use_backend

pytestmark = NEEDS_A_BUILD

C, STEEP = sorted_centers(4), torch.tensor([7.0])
X = values(150_000, C).nan_to_num(posinf=3.0, neginf=-3.0)
LOGITS = X.reshape(3, -1)


def loss_and_gradients() -> list[Tensor]:
    """What a training step computes: soft weights and their gradients, and a distillation loss with its own."""
    x, c = X.clone().requires_grad_(), C.clone().requires_grad_()
    student = LOGITS.clone().requires_grad_()
    with use_backend("cpp"):
        soft = qk.soft_quantize(x, c, STEEP)
        loss = qk.distillation_loss(student, LOGITS.flip(0), 2.0)
        return [soft.detach(), loss.detach(), *torch.autograd.grad((soft.square().sum(), loss), (x, c, student))]


def test_a_new_number_of_threads_between_calls_changes_no_bit() -> None:
    torch.set_num_threads(1)
    expected = loss_and_gradients()
    for threads in (2, 7, 1, 3, 1, 2):
        torch.set_num_threads(threads)
        assert all(same_bits(a.reshape(-1), b.reshape(-1)) for a, b in zip(loss_and_gradients(), expected, strict=True))


def test_numbers_of_threads_that_change_under_running_callers_change_no_bit() -> None:
    """torch's number is one for the process: each caller changes it under the others."""
    expected = loss_and_gradients()
    wrong: list[str] = []

    def work(i: int) -> None:
        for turn in range(6):
            torch.set_num_threads(1 + (i + turn) % 4)
            found = loss_and_gradients()
            if not all(same_bits(a.reshape(-1), b.reshape(-1)) for a, b in zip(found, expected, strict=True)):
                wrong.append(f"caller {i}, turn {turn}")

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def _native_assign(threads: int) -> bytes:
    """Without torch's own kernels: their OpenMP threads do not survive a fork."""
    torch.set_num_threads(threads)
    codes = torch.empty(X.shape, dtype=torch.uint8)
    cpp.launch("assign", (X, C), (codes,))
    return codes.numpy().tobytes()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason=f"{sys.platform} cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers_compute_while_the_parent_goes_on() -> None:
    expected = _native_assign(2)  # the pool has threads, which the children do not inherit
    with multiprocessing.get_context("fork").Pool(3) as pool:
        pending = pool.map_async(_native_assign, [2, 1, 3, 2, 4, 1])
        assert _native_assign(2) == expected
        assert pending.get(timeout=60) == [expected] * 6
    assert _native_assign(2) == expected


CORES = """
import os, torch
from qupedkern.backends import cpp
torch.set_num_threads(3)
x, c, codes = torch.randn(1 << 18), torch.tensor([-1.0, 0.5]), torch.empty(1 << 18, dtype=torch.uint8)
mine = os.sched_getaffinity(0)
before = set(os.listdir("/proc/self/task"))
cpp.launch("assign", (x, c), (codes,))
workers = set(os.listdir("/proc/self/task")) - before
print(len(workers), os.sched_getaffinity(0) == mine)
print(all(len(mine - os.sched_getaffinity(int(worker))) == 1 for worker in workers))
one = {min(mine)}
os.sched_setaffinity(0, one)
cpp.launch("assign", (x, c), (codes,))
os.sched_setaffinity(0, mine)
cpp.launch("assign", (x, c), (codes,))
print(all(os.sched_getaffinity(int(worker)) < mine for worker in workers))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are kept off a core on Linux alone")
def test_workers_are_kept_off_the_core_of_their_caller() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this process may use one core alone")
    done = run_python(CORES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "True", "True", "True"]


def test_a_second_import_of_a_native_module_is_the_first() -> None:
    for isa in cpp._info()["cpu"]:
        name = cpp._module_name(isa)
        if isa not in cpp._import("baseline").supported_instruction_sets():
            continue
        before = importlib.import_module(name)
        kept = sys.modules.pop(name)
        try:
            again = importlib.import_module(name)
            assert set(again.KERNELS) == set(before.KERNELS)
            out = torch.empty(X.shape, dtype=torch.uint8)
            again.assign(2, cpp._pass(X), cpp._pass(C), cpp._pass(out))
            assert torch.equal(out, qk.assign(X, C))
        finally:
            sys.modules[name] = kept


RELOAD = """
import importlib, threading, torch, qupedkern as qk
x, c = torch.randn(100_000), torch.tensor([-1.0, 0.5])
before = qk.assign(x, c)
def reload_all():
    importlib.reload(qk)
    importlib.reload(importlib.import_module("qupedkern.backends.cpp"))
reload_all()
caller = threading.Thread(target=reload_all)
caller.start()
caller.join()
assert torch.equal(qk.assign(x, c), before)
print(qk.explain("assign", x, c).backend)
"""


def test_reloading_the_package_leaves_the_kernels_in_place() -> None:
    done = run_python(RELOAD)
    assert (done.stdout, done.returncode) == ("cpp\n", 0), done.stderr


@pytest.mark.parametrize("first", ["qupedkern", "qupedkern.backends.cpp", "fl"])
def test_whatever_is_imported_first_the_kernels_are_found(first: str) -> None:
    done = run_python(f"import {first}, qupedkern as qk; print('assign' in qk.backends().kernels['cpp'])")
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
