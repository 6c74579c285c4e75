"""What a packed model's file holds, layer by layer, to the byte; without the model."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from qupedkern._table import aligned

from .read import PackedFile, open_packed

_COLUMNS = ("layer", "kind", "shape", "levels", "groups", "bits/weight", "codes", "centers", "bias", "bytes")


@dataclass(frozen=True)
class LayerSize:
    """One packed layer of a file. Bytes are 0 for tensors that are stored under another layer's name."""

    name: str
    kind: str
    shape: tuple[int, ...]
    levels: int
    bits: int
    groups: int
    codes_bytes: int
    centers_bytes: int
    bias_bytes: int

    @property
    def weights(self) -> int:
        """Weights stored here: 0 where they are another layer's."""
        return math.prod(self.shape) if self.codes_bytes else 0

    @property
    def total_bytes(self) -> int:
        return self.codes_bytes + self.centers_bytes + self.bias_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of codes and centers; 0 where they are another layer's."""
        return 8 * (self.codes_bytes + self.centers_bytes) / self.weights if self.weights else 0.0


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
        packed = sum(layer.codes_bytes + layer.centers_bytes for layer in self.layers)
        return self.file_bytes - self.header_bytes - packed + 4 * sum(layer.weights for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: every field, with the computed ones."""
        table = asdict(self)
        for entry, layer in zip(table["layers"], self.layers, strict=True):
            entry.update(shape=list(layer.shape), total_bytes=layer.total_bytes, bits_per_weight=layer.bits_per_weight)
        return {**table, "layers": list(table["layers"]), "float_bytes": self.float_bytes}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            (
                *(layer.name, layer.kind, "x".join(map(str, layer.shape)), f"{layer.levels}", f"{layer.groups}"),
                *(
                    f"{layer.bits_per_weight:.2f}" if layer.codes_bytes else "shared",
                    f"{layer.codes_bytes:,}",
                    f"{layer.centers_bytes:,}",
                ),
                *(f"{layer.bias_bytes:,}", f"{layer.total_bytes:,}"),
            )
            for layer in self.layers
        ]
        blank = [""] * (len(_COLUMNS) - 2)
        rest = (f"{self.other_tensors} others", self.other_bytes), ("header", self.header_bytes)
        rows += [(name, *blank, f"{size:,}") for name, size in (*rest, ("file", self.file_bytes))]
        weights = sum(layer.weights for layer in self.layers)
        packed = sum(layer.codes_bytes + layer.centers_bytes for layer in self.layers)
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
