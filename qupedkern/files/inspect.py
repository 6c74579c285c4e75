"""What a packed model's file holds, layer by layer, to the byte; without the model."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from qupedkern._table import aligned
from qupedkern.nn._sizes import SIZE_COLUMNS, LayerSize

from .read import PackedFile, open_packed

_COLUMNS = (*SIZE_COLUMNS, "bytes")


@dataclass(frozen=True)
class Inspection:
    """A packed model's file: sum of the layers' total_bytes + other_bytes + header_bytes = file_bytes. str() is a table."""

    path: str
    format_version: int
    library_version: str
    layers: tuple[LayerSize, ...]
    other_tensors: int
    other_bytes: int
    header_bytes: int
    file_bytes: int

    @property
    def float_bytes(self) -> int:
        """Of the same tensors with every weight in float32, and no centers."""
        packed = sum(layer.weight_bytes for layer in self.layers)
        return self.file_bytes - self.header_bytes - packed + 4 * sum(layer.weights for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: every field, with the computed ones."""
        table = asdict(self)
        for entry, layer in zip(table["layers"], self.layers, strict=True):
            entry.update(shape=list(layer.shape), total_bytes=layer.total_bytes, bits_per_weight=layer.bits_per_weight)
        return {**table, "layers": list(table["layers"]), "float_bytes": self.float_bytes}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [(*layer.cells(), f"{layer.total_bytes:,}") for layer in self.layers]
        blank = [""] * (len(_COLUMNS) - 2)
        rest = (f"{self.other_tensors} others", self.other_bytes), ("header", self.header_bytes)
        rows += [(name, *blank, f"{size:,}") for name, size in (*rest, ("file", self.file_bytes))]
        weights = sum(layer.weights for layer in self.layers)
        packed = sum(layer.weight_bytes for layer in self.layers)
        tensors = self.file_bytes - self.header_bytes
        title = f"{self.path}: packed model, format {self.format_version}, written by qupedkern {self.library_version}"
        total = (
            f"{weights:,} weights at {8 * packed / max(weights, 1):.2f} bits each; tensors {tensors:,} bytes, "
            f"with float32 weights {self.float_bytes:,}: {self.float_bytes / max(tensors, 1):.1f} times smaller"
        )
        return "\n".join([title, *aligned(_COLUMNS, rows, left=("layer", "kind")), total])


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read a packed model's file and validate it, values included, in little memory. Raises FileError, FileNotFoundError."""
    with open_packed(path) as file:
        file.check()
        return _inspection(os.fspath(path), file)


def _inspection(path: str, file: PackedFile) -> Inspection:
    own = {name: stored.nbytes for name, stored in file.container.stored.items()}
    layers = tuple(
        LayerSize(
            name=name,
            kind=record.kind,
            shape=record.shape,
            levels=record.levels,
            bits=record.bits,
            groups=record.groups,
            codes_bytes=own.pop(f"{name}.packed", 0),
            centers_bytes=own.pop(f"{name}.centers", 0),
            bias_bytes=own.pop(f"{name}.bias", 0),
        )
        for name, record in file.header.layers.items()
    )
    tensor_bytes = sum(stored.nbytes for stored in file.container.stored.values())
    header = file.header
    return Inspection(
        path=path,
        format_version=header.version,
        library_version=header.library_version,
        layers=layers,
        other_tensors=len(own),
        other_bytes=sum(own.values()),
        header_bytes=file.container.size - tensor_bytes,
        file_bytes=file.container.size,
    )
