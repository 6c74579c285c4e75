"""Tensors that several processes of one machine see: one mapped file in memory, laid out once, without a copy a process."""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fl.core import Client
from fl.data import ClientData, Part
from fl.storage import Tensors

PARTS = ("train", "val", "test")
PREFIX = "qupedkern-"
YOUNG = 60.0  # seconds: a directory may not be locked yet
_HELD: dict[Path, int] = {}  # the directories of this process, each with the handle that holds its lock
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
    """A new directory in memory, where the system has such a place, else among the temporary files.

    In memory it lasts until the next start of the machine, so what runs that were killed have left there is removed.
    """
    memory = Path("/dev/shm")
    if not memory.is_dir() or not os.access(memory, os.W_OK):
        return Path(tempfile.mkdtemp(prefix=PREFIX))
    _remove_abandoned(memory)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=memory))
    _HELD[directory] = os.open(directory, os.O_RDONLY)
    _lock(_HELD[directory])
    return directory


def remove(directory: Path) -> None:
    """Delete a shared directory; processes that have its files open keep them until they end."""
    shutil.rmtree(directory, ignore_errors=True)
    if directory in _HELD:
        os.close(_HELD.pop(directory))


def _remove_abandoned(memory: Path) -> None:
    """Delete the shared directories that no process holds, which the system has released when their holder died."""
    for directory in memory.glob(PREFIX + "*"):
        with suppress(OSError):  # gone, or another user's
            if time.time() - directory.stat().st_mtime < YOUNG:
                continue
            handle = os.open(directory, os.O_RDONLY)
            try:
                if _lock(handle):
                    shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(handle)


def _lock(handle: int) -> bool:
    import fcntl  # which every system with /dev/shm has

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
