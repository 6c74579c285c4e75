"""Data sets as plain arrays, and what a client holds of one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fl.errors import DataError
from fl.seeds import numpy_generator


@dataclass(frozen=True)
class Dataset:
    """Images and their labels.

    x: [N, channels, height, width], float32, or uint8 in 0..255, which models see as x / 255.
    y: int64 [N], in 0..num_classes - 1.  writer: int64 [N], who made each image, where that is known.
    test_rows: int64, the rows of the official test set, where there is one.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    num_classes: int
    writer: np.ndarray | None = None
    test_rows: np.ndarray | None = None

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return (self.x.shape[1], self.x.shape[2], self.x.shape[3])


@dataclass(frozen=True)
class Split:
    """Indices into a data set: three int64 arrays without a common element."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Part:
    """Images and labels as tensors. x: float32 [n, channels, height, width]; y: int64 [n]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class ClientData:
    """What one client holds: its classes, and its own train, validation and test images of them."""

    classes: tuple[int, ...]
    train: Part
    val: Part
    test: Part


def images(x: np.ndarray, shrink: int = 1) -> np.ndarray:
    """Images as models see them: float32, bytes over 255, each shrink x shrink block replaced by its mean."""
    x = x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else x.astype(np.float32)
    if shrink == 1:
        return x
    count, channels, height, width = x.shape
    rows, columns = shrunk(height, width, shrink)
    blocks = x.reshape(count, channels, rows, shrink, columns, shrink)
    return blocks.mean((3, 5), dtype=np.float32)


def shrunk(height: int, width: int, shrink: int) -> tuple[int, int]:
    """An image's height and width once each shrink x shrink block is one pixel."""
    if shrink < 1 or height % shrink or width % shrink:
        raise DataError(f"data: shrink must divide the images' {height} x {width}, got {shrink}")
    return height // shrink, width // shrink


def client_data(
    dataset: Dataset, part: Split, *, shrink: int = 1, noise: float = 0.0, seed: int = 0, client: int = 0
) -> ClientData:
    """One client's images as tensors.

    shrink: see images.  noise: standard deviation of normal noise on every pixel, fixed by seed and client.
    """

    def tensors(position: int, indices: np.ndarray) -> Part:
        x = images(dataset.x[indices], shrink)
        if noise > 0:
            x = x + np.float32(noise) * numpy_generator(seed, "noise", client, position).standard_normal(
                x.shape, dtype=np.float32
            )
        return Part(torch.from_numpy(x), torch.from_numpy(dataset.y[indices]))

    classes = tuple(int(label) for label in np.unique(dataset.y[part.train]))
    return ClientData(classes, *(tensors(i, getattr(part, name)) for i, name in enumerate(PARTS)))


def class_counts(clients: Sequence[ClientData], num_classes: int) -> np.ndarray:
    """How many training images of each class each client holds: int64 [clients, num_classes]."""
    counts = [np.bincount(client.train.y.numpy(), minlength=num_classes) for client in clients]
    return np.stack(counts).astype(np.int64)
