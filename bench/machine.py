"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import qupedkern as qk

from .runs import is_tuned


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _caches() -> str:
    """Size of each level of data cache as the system tells it, "" where it does not."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (folder / "type").read_text().strip() != "Instruction":
            sizes["L" + (folder / "level").read_text().strip()] = (folder / "size").read_text().strip()
    return ", ".join(f"{level} {size}" for level, size in sizes.items())


@lru_cache(maxsize=1)
def commit() -> str:
    """The commit the code is at, with + where the tree has changes; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        name = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip()


def description() -> dict[str, Any]:
    """Processor, torch, threads, native build, load (1-minute average), malloc and commit: what every record carries."""
    return {
        "machine": _processor(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "native": qk.backends().descriptions["cpp"],
        "load": round(os.getloadavg()[0], 1),
        "malloc": "tuned" if is_tuned() else "default",
        "commit": commit(),
    }


def sentence(of: dict[str, Any]) -> str:
    """A description in words; the number of threads is each row's own."""
    malloc = " (MALLOC_MMAP_MAX_=0, MALLOC_TRIM_THRESHOLD_=2^35)" if of["malloc"] == "tuned" else ""
    return (
        f"{of['machine']}, {of['cores']} cores, {of['caches']}; torch {of['torch']}; kernels: {of['native']}; "
        f"malloc {of['malloc']}{malloc}; commit {of['commit']}."
    )
