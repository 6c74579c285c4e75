"""Tensors that several processes of one machine see: one mapped file in memory, laid out once, without a copy a process."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl.core import Client
from fl.data import ClientData, Part
from fl.storage import Tensors

PARTS = ("train", "val", "test")
ALIGNMENT = 64  # bytes: as torch aligns its own memory, so kernels take the same path as on a tensor of their own


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in the file: name -> (type, shape, first byte). Plain data, to be sent to a process."""

    path: Path
    size: int
    places: dict[str, tuple[torch.dtype, tuple[int, ...], int]]

    def open(self) -> Tensors:
        """The tensors, on the file's own memory: what one process writes the others read."""
        if self.size == 0:
            return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape, _) in self.places.items()}
        memory = torch.from_file(str(self.path), shared=True, size=self.size, dtype=torch.uint8)
        return {name: _view(memory, *place) for name, place in self.places.items()}


def _view(memory: Tensor, dtype: torch.dtype, shape: tuple[int, ...], first: int) -> Tensor:
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return memory[first : first + count * dtype.itemsize].view(dtype).view(shape)


def share(path: Path, tensors: Mapping[str, Tensor]) -> Layout:
    """Lay the tensors out in a new file and copy them there."""
    places: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
    size = 0
    for name, tensor in tensors.items():
        places[name] = (tensor.dtype, tuple(tensor.shape), size)
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    path.write_bytes(b"")
    layout = Layout(path, size, places)
    for name, shared in layout.open().items():
        shared.copy_(tensors[name])
    return layout


def shared_directory() -> Path:
    """A new directory in memory, where the system has such a place, else among the temporary files."""
    memory = Path("/dev/shm")
    options: dict[str, Any] = {"dir": memory} if memory.is_dir() else {}
    try:
        return Path(tempfile.mkdtemp(prefix="qupedkern-", **options))
    except OSError:  # it is there, but not ours to write to
        return Path(tempfile.mkdtemp(prefix="qupedkern-"))


def remove(directory: Path) -> None:
    """Delete a shared directory; processes that have its files open keep them until they end."""
    shutil.rmtree(directory, ignore_errors=True)


def part(clients: Sequence[Client]) -> tuple[list[Client], Tensors]:
    """(clients without data, their data by name): what is pickled for another process, and what it maps."""
    nothing = Part(torch.empty(0), torch.empty(0))
    devices = [replace(client, data=ClientData(client.data.classes, nothing, nothing, nothing)) for client in clients]
    tensors = {
        f"{client.id}.{name}.{of}": getattr(getattr(client.data, name), of)
        for client in clients
        for name in PARTS
        for of in ("x", "y")
    }
    return devices, tensors


def join(devices: Sequence[Client], tensors: Mapping[str, Tensor]) -> dict[int, Client]:
    """The clients that `part` took apart, by number."""
    joined = {}
    for device in devices:
        parts = [Part(tensors[f"{device.id}.{name}.x"], tensors[f"{device.id}.{name}.y"]) for name in PARTS]
        joined[device.id] = replace(device, data=ClientData(device.data.classes, *parts))
    return joined
