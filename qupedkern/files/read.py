"""A packed model's file, open: header and tensors validated together, before and while values are read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qupedkern.nn import KINDS
from qupedkern.nn._codes import codes_problem

from .container import CHUNK, Container, Stored, opened
from .errors import refusal
from .header import Header, LayerRecord, from_metadata

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Chunks = Callable[[str, int], Iterator[Tensor]]  # (name of a tensor, unit) -> its pieces, flat, multiples of unit


@dataclass(frozen=True)
class PackedFile:
    """header, and the tensors by every name they have, aliases included; types and shapes of layers are already valid."""

    container: Container
    header: Header
    stored: dict[str, Stored]

    def read(self) -> dict[str, Tensor]:
        """Every tensor by name, aliases the same tensor; values of the layers validated. Raises FileError."""
        tensors = {name: self.container.read(name) for name in self.container.stored}
        tensors.update({alias: tensors[name] for alias, name in self.header.aliases.items()})

        def pieces(name: str, unit: int) -> Iterator[Tensor]:
            flat = tensors[name].reshape(-1)
            return iter(flat.split(max(CHUNK // (unit * flat.element_size()), 1) * unit))

        self._check_values(pieces)
        return tensors

    def check(self) -> None:
        """Validate the values of the layers a piece at a time, keeping none. Raises FileError."""
        aliases = self.header.aliases
        self._check_values(lambda name, unit: self.container.chunks(aliases.get(name, name), unit))

    def _check_values(self, chunks: Chunks) -> None:
        for name, record in self.header.layers.items():
            _check_centers(self.container.path, name, record, chunks)
            _check_codes(self.container.path, name, record, chunks)


@contextmanager
def open_packed(path: str | os.PathLike[str]) -> Iterator[PackedFile]:
    """A packed model's file with everything but values validated. Raises FileError, or FileNotFoundError."""
    with opened(path) as container:
        header = from_metadata(path, container.metadata)
        stored = dict(container.stored)
        for alias, name in header.aliases.items():
            if alias in container.stored or name not in container.stored:
                raise refusal(path, f"alias {alias!r} of {name!r} points nowhere")
            stored[alias] = stored[name]
        parts: dict[str, set[str]] = {name: set() for name in header.layers}
        for name in stored:
            parts.get(owner_of(name), set()).add(name)
        for name, record in header.layers.items():
            needed = {f"{name}.{part}" for part in ("packed", "centers", *(("bias",) if record.bias else ()))}
            if parts[name] != needed:
                raise refusal(path, f"layer {name!r} must have the tensors {sorted(needed)}, got {sorted(parts[name])}")
            _check_types(path, name, record, stored)
        yield PackedFile(container, header, stored)


def owner_of(tensor_name: str) -> str:
    """The module of a tensor: "0.conv.weight" -> "0.conv"."""
    return tensor_name.rpartition(".")[0]


def _check_types(path: Any, name: str, record: LayerRecord, stored: dict[str, Stored]) -> None:
    """A layer's tensors have the shapes of its record and one float type."""
    packed, centers = stored[f"{name}.packed"], stored[f"{name}.centers"]
    shapes = {f"{name}.centers": (record.levels,) if record.groups == 1 else (record.groups, record.levels)}
    if record.bias:
        shapes[f"{name}.bias"] = (KINDS[record.kind].packed.bias_length(record.arguments, record.shape),)
    for key, shape in shapes.items():
        came = stored[key]
        if came.shape != shape or came.dtype != centers.dtype or came.dtype not in _FLOATS:
            needed = f"{shape} of one float type in the layer"
            raise refusal(path, f"{key} must be {needed}, got {came.dtype} {came.shape}")
    size = -(-math.prod(record.shape) * record.bits // 8)
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        problem = f"({size:,} bytes), got {packed.dtype} {packed.shape}"
        raise refusal(path, f"{name}.packed does not hold {record.shape} codes of {record.bits} bits {problem}")


def _check_centers(path: Any, name: str, record: LayerRecord, chunks: Chunks) -> None:
    """Finite, every row ascending."""
    for piece in chunks(f"{name}.centers", record.levels):
        rows = piece.reshape(-1, record.levels)
        if not bool(rows.isfinite().all()) or bool((rows[:, 1:] < rows[:, :-1]).any()):
            raise refusal(path, f"{name}.centers must be finite and ascending")


def _check_codes(path: Any, name: str, record: LayerRecord, chunks: Chunks) -> None:
    problem = codes_problem(  # `bits` bytes hold eight codes
        chunks(f"{name}.packed", record.bits), math.prod(record.shape), record.bits, record.levels
    )
    if problem is not None:
        raise refusal(path, f"{name}.packed {problem}")
