"""The safetensors container: 8 bytes of length, a JSON header, the tensors end to end, all little-endian.

Read here and not by the safetensors package, whose tensors are a map of the file: whatever is later written into the file
would change a model that was validated, and a file that is cut would end the process. Here a file is opened once, nothing is
allocated before the header has been checked against the length of the file, and what is read is a copy. Both agree on
what is a valid file, except that names must not repeat, bool must be 0 or 1 and headers end at 16 MiB (tests compare them).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from . import strict_json
from .errors import FileError, refusal

_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 16 * 2**20  # bytes: about 25,000 layers; parsing takes some 25 bytes of memory for each
_MOST_DIMENSIONS = 16
_LARGEST_SIZE = 2**62
CHUNK = 2**20  # bytes read at a time where a tensor is only looked through


@dataclass(frozen=True)
class Stored:
    """What a header says of one tensor; begin: where its bytes are, from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Container:
    """An open file: its metadata, what tensors it holds, and their values on request."""

    def __init__(
        self, path: Any, file: IO[bytes], size: int, metadata: dict[str, str], stored: dict[str, Stored]
    ) -> None:
        self.path, self.size, self.metadata, self.stored = path, size, metadata, stored
        self._file = file

    def read(self, name: str) -> Tensor:
        """A copy of one tensor."""
        stored = self.stored[name]
        return self._read(name, stored, 0, stored.numel).reshape(stored.shape)

    def chunks(self, name: str, unit: int) -> Iterator[Tensor]:
        """The tensor, flat, in pieces of about CHUNK bytes, each a multiple of `unit` elements (the last may be short)."""
        stored = self.stored[name]
        step = max(CHUNK // (unit * stored.dtype.itemsize), 1) * unit
        for start in range(0, stored.numel, step):
            yield self._read(name, stored, start, min(step, stored.numel - start))

    def _read(self, name: str, stored: Stored, start: int, count: int) -> Tensor:
        content = torch.empty(count * stored.dtype.itemsize, dtype=torch.uint8)
        self._file.seek(stored.begin + start * stored.dtype.itemsize)
        if self._file.readinto(content.numpy()) != len(content):  # type: ignore[attr-defined]
            raise OSError("it became shorter while it was read")
        if stored.dtype == torch.bool and bool((content > 1).any()):
            raise refusal(self.path, f"{name} is of type bool and has a value that is neither true nor false")
        return content.view(stored.dtype)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Container]:
    """A file open for reading, its header validated. Raises FileNotFoundError, or FileError for all that is wrong with it."""
    if not Path(path).exists():
        raise FileNotFoundError(f"load: there is no file {os.fspath(path)}")
    if not Path(path).is_file():
        raise refusal(path, "not a file")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            metadata, stored = _read_header(file, size)
            yield Container(path, file, size, metadata, stored)
    except FileError:
        raise
    except (OSError, _NotSafetensors) as error:
        raise refusal(path, f"not a readable safetensors file ({error})") from error


class _NotSafetensors(Exception):
    """What is wrong with a header."""


def _read_header(file: IO[bytes], size: int) -> tuple[dict[str, str], dict[str, Stored]]:
    length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
    if length < 2:
        raise _NotSafetensors("it has no header")
    if length > min(size - 8, _LARGEST_HEADER):
        limit = f"the largest is {_LARGEST_HEADER:,}" if length <= size - 8 else f"the file has {size:,}"
        raise _NotSafetensors(f"its header would have {length:,} bytes, {limit}")
    text = file.read(length)
    try:
        if text[:1] != b"{":
            raise ValueError("it does not begin with {")
        header = strict_json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise _NotSafetensors(f"its header is no valid JSON: {error}") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _NotSafetensors("its metadata must map names to strings")
    stored, end = {}, 8 + length
    entries = [(name, *_entry(name, entry)) for name, entry in header.items()]
    for name, dtype, shape, (begin, stop) in sorted(entries, key=lambda entry: entry[3]):
        stored[name] = Stored(dtype, shape, 8 + length + begin)
        if 8 + length + begin != end or stop - begin != stored[name].nbytes:
            raise _NotSafetensors(f"tensor {name!r} does not lie where it should")
        end = 8 + length + stop
    if end != size:
        raise _NotSafetensors(f"its tensors end at byte {end:,}, the file at {size:,}")
    return metadata, stored


def _entry(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _NotSafetensors(f"tensor {name!r} must be described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _NotSafetensors(f"tensor {name!r} has type {dtype!r}, known are {', '.join(_DTYPES)}")
    for what, sizes, longest in (("shape", shape, _MOST_DIMENSIONS), ("data_offsets", offsets, 2)):
        if not isinstance(sizes, list) or len(sizes) > longest or not all(is_int(s, 0, _LARGEST_SIZE) for s in sizes):
            raise _NotSafetensors(f"tensor {name!r} needs {what} of at most {longest} sizes, got {sizes!r}")
    if len(offsets) != 2:
        raise _NotSafetensors(f"tensor {name!r} needs two data_offsets, got {offsets!r}")
    return _DTYPES[dtype], tuple(shape), (offsets[0], offsets[1])


def container_types() -> tuple[torch.dtype, ...]:
    """What a tensor in a container may be."""
    return tuple(_NAMES)


def is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def why_not_stored(tensor: Tensor) -> str | None:
    """Why the container cannot hold a tensor."""
    if tensor.layout != torch.strided or tensor.dtype not in _NAMES or tensor.device.type == "meta":
        return f"a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device}"
    return None


def write(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file, one tensor after the other; equal tensors and metadata give equal bytes.

    Larger types come first, so that every tensor is aligned to its own size.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
