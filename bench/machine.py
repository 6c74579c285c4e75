"""What a measurement ran on."""

from __future__ import annotations

import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import qupedkern as qk


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


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
    """Processor, torch, threads, native build and commit: the fields every record carries."""
    return {
        "machine": _processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "native": qk.backends().descriptions["cpp"],
        "commit": commit(),
    }
