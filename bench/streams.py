"""The limit: the time in which this machine moves the bytes an op must move, by the best of several ways to move them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("stream.cpp")
_FOLDER = Path(__file__).resolve().parent.parent / "build" / "bench"
_FLAGS = ("-O3", "-std=c++17", "-march=native", "-shared", "-fPIC", "-pthread")
_STEP = 256  # bytes; stream() takes whole steps

Move = tuple[Sequence[Tensor], Sequence[Tensor]]  # tensors read and tensors written, in one pass


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    """stream.cpp built for this machine, once per content and machine. RuntimeError where no compiler builds it."""
    cpu = Path("/proc/cpuinfo")
    flags = (
        next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.is_file() else ""
    )
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join((*_FLAGS, flags)).encode()).hexdigest()[:16]
    built = _FOLDER / f"stream-{key}.so"
    if not built.is_file():
        _FOLDER.mkdir(parents=True, exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "c++"), *_FLAGS, "-o", str(unfinished), str(_SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            raise RuntimeError(
                f"the machine's limit needs a C++ compiler: {' '.join(command)} failed: {said}"
            ) from error
        unfinished.replace(built)
    library = ctypes.CDLL(str(built))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.stream.argtypes = [integer, integer, pointer, integer, pointer, ctypes.c_int64, integer]
    library.stream.restype = integer
    library.read_only.argtypes = [integer, pointer, ctypes.c_int64, integer, pointer]
    library.read_only.restype = integer
    return library


def stream(threads: int, sources: Sequence[Tensor], targets: Sequence[Tensor], nontemporal: bool) -> Callable[[], None]:
    """A call that reads every source and writes their sum as integers to every target, once, in one pass.

    1 to 4 of each, contiguous, of equal size, a multiple of 256 bytes at addresses that are multiples of 64. A target may
    be a source (in place). ValueError for anything else.
    """
    tensors = (*sources, *targets)
    size = tensors[0].nbytes if tensors else 0
    if any(t.nbytes != size or not t.is_contiguous() for t in tensors):
        raise ValueError(
            f"stream: tensors must be contiguous and of equal size, got {[tuple(t.shape) for t in tensors]}"
        )
    read = (ctypes.c_void_p * len(sources))(*(t.data_ptr() for t in sources))
    written = (ctypes.c_void_p * len(targets))(*(t.data_ptr() for t in targets))
    function = _library().stream

    def run() -> None:
        if function(threads, len(read), read, len(written), written, size, nontemporal):
            raise ValueError(
                f"stream: 1 to 4 sources and targets of whole {_STEP} bytes aligned to 64 are needed, got "
                f"{len(read)} and {len(written)} of {size} bytes"
            )

    run.tensors = tensors  # type: ignore[attr-defined]  # kept alive with the addresses
    return run


def limits(threads: int, moves: Sequence[Move]) -> Mapping[str, Callable[[], object]]:
    """The ways to move the bytes of all `moves`: ordinary and non-temporal streams, and a torch copy of as many bytes.

    The limit is the smallest of their times. Targets are overwritten.
    """
    moved = sum(t.nbytes for sources, targets in moves for t in (*sources, *targets))
    source = torch.ones(moved // 8)
    target = torch.empty_like(source)

    def several(nontemporal: bool) -> Callable[[], None]:
        calls = [stream(threads, sources, targets, nontemporal) for sources, targets in moves]

        def run() -> None:
            for call in calls:
                call()

        return run

    return {
        "limit: streams": several(False),
        "limit: non-temporal streams": several(True),
        "limit: copy": lambda: target.copy_(source),
    }


def read_only(threads: int, source: Tensor, two_streams: bool) -> Callable[[], int]:
    """A call that reads `source` once and gives the sum of its 32-bit integers, wrapped to 32 bits.

    Contiguous, whole 256 bytes at an address that is a multiple of 64; ValueError for anything else. two_streams: each
    thread reads two halves of its share in step, prefetched; which way is faster depends on the machine.
    """
    if not source.is_contiguous():
        raise ValueError(f"read_only: the source must be contiguous, got strides {source.stride()}")
    function, found = _library().read_only, ctypes.c_int32()

    def run() -> int:
        if function(threads, source.data_ptr(), source.nbytes, two_streams, ctypes.byref(found)):
            raise ValueError(f"read_only: whole {_STEP} bytes aligned to 64 are needed, got {source.nbytes} bytes")
        return found.value

    return run


def reads(threads: int, source: Tensor) -> Mapping[str, Callable[[], object]]:
    """The ways to read `source` once. The limit of reading is the smallest of their times."""
    return {
        "limit: read": read_only(threads, source, False),
        "limit: read, two streams": read_only(threads, source, True),
    }


def scratch(count: int, numel: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """`count` tensors of random bytes for a move of `numel` elements each, cut to whole steps."""
    whole = numel * torch.empty((), dtype=dtype).element_size() // _STEP * _STEP
    generator = torch.Generator().manual_seed(0)
    # one draw, shifted: what the bytes are does not matter, that they are not zeros does
    drawn = torch.randint(0, 256, (whole,), dtype=torch.uint8, generator=generator)
    return [drawn.roll(64 * k) for k in range(count)]
