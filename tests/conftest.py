"""Hypothesis profiles, what runs on this machine, poisoned outputs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from qupedkern import use_backend
from qupedkern.testing.harness import missing_backends, poisoned_outputs, running_backends

# Workers share the processors: torch's threads in each of them would spin on the cores of the others. Tests that are about
# threads set their number.
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes they start
    torch.set_num_threads(1)

_SLOW_MACHINE = (HealthCheck.too_slow, HealthCheck.data_too_large)  # a shared runner is no reason to fail
settings.register_profile("dev", max_examples=25, deadline=None, suppress_health_check=_SLOW_MACHINE)
settings.register_profile("ci", max_examples=120, deadline=None, derandomize=True, suppress_health_check=_SLOW_MACHINE)
settings.register_profile("slow", max_examples=1500, deadline=None, suppress_health_check=_SLOW_MACHINE)
settings.register_profile(  # kernels interpreted in Python
    "interpreted", max_examples=10, deadline=None, derandomize=True, suppress_health_check=_SLOW_MACHINE
)
settings.register_profile(  # kernels emulated, compiled
    "emulated", max_examples=40, deadline=None, derandomize=True, suppress_health_check=_SLOW_MACHINE
)
settings.register_profile(  # on a GPU, whose kernels are compiled as the examples come
    "gpu",
    max_examples=int(os.environ.get("QUPEDKERN_EXAMPLES", 25)),
    deadline=None,
    suppress_health_check=_SLOW_MACHINE,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


_LONG = (
    "test_triton",
    "test_cuda",
    "test_kills",
    "test_native_build",
)  # a minute and more: begun first, workers end together


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.name.startswith(_LONG))


def pytest_report_header() -> list[str]:
    """Nothing is left out in silence: a backend that cannot run here is named with its reason."""
    lines = [f"qupedkern: backends {', '.join(running_backends())}; torch {torch.__version__}"]
    lines += [f"qupedkern: backend {name} does not run here: {reason}" for name, reason in missing_backends().items()]
    return lines


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Every kernel starts from poisoned outputs; no test leaves a forced backend or a thread count behind."""
    threads = torch.get_num_threads()
    with use_backend(None), poisoned_outputs():
        yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
