"""Data sets as arrays, and seeded splits: train / validation / test, then clients that each see a few classes.

digits      scikit-learn's 1,797 handwritten digits, 8 x 8, real images that ship inside the package
<file>.npz  arrays `x` and `y`, looked for in the data directory (--data or QUPEDKERN_DATA)
"""

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fl.errors import DataError
from fl.seeds import numpy_generator

DATA_VARIABLE = "QUPEDKERN_DATA"
FRACTIONS = (0.6, 0.1, 0.3)


@dataclass(frozen=True)
class Dataset:
    """Images and their labels.

    x: float32 [N, channels, height, width], in [0, 1] for digits.  y: int64 [N], in 0..num_classes - 1.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    num_classes: int

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


def digits() -> Dataset:
    """scikit-learn's handwritten digits: x [1797, 1, 8, 8] scaled from 0..16 to [0, 1], y in 0..9."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"data: digits needs scikit-learn ({error}), install it with qupedkern's extra 'fl'") from error
    bunch = load_digits()
    x = (bunch.images[:, None] / 16.0).astype(np.float32)  # 16: the largest pixel value in the file
    return Dataset("digits", x, bunch.target.astype(np.int64), 10)


def npz(path: Path) -> Dataset:
    """A data set from an .npz file: `x` [N, H, W] or [N, C, H, W], integer labels `y` [N], no pickled objects."""
    if not path.is_file():
        raise DataError(f"data: there is no file {path}, give its directory with --data or {DATA_VARIABLE}")
    if not zipfile.is_zipfile(path):
        raise DataError(f"data: {path} must be an .npz file with arrays 'x' and 'y', it is not in that format")
    try:
        with np.load(path, allow_pickle=False) as archive:
            x, y = np.asarray(archive["x"]), np.asarray(archive["y"])
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"data: {path} must be an .npz file with plain arrays 'x' and 'y', got: {error}") from error
    if x.ndim not in (3, 4) or y.shape != x.shape[:1] or len(y) == 0:
        raise DataError(
            f"data: {path} needs x of shape [N, H, W] or [N, C, H, W] and y of shape [N], "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    if x.dtype.kind not in "fiu" or y.dtype.kind not in "iu" or y.min() < 0 or not np.isfinite(x).all():
        raise DataError(f"data: {path} needs finite numbers in x and labels 0, 1, .. in y, got {x.dtype} and {y.dtype}")
    x = x.astype(np.float32)
    return Dataset(path.name, x[:, None] if x.ndim == 3 else x, y.astype(np.int64), int(y.max()) + 1)


def data_directory(option: str | Path | None) -> Path | None:
    """The directory of data files: the option, else the environment's QUPEDKERN_DATA, else None."""
    given = option if option is not None else os.environ.get(DATA_VARIABLE)
    if not given:
        return None
    directory = Path(given).expanduser()
    if not directory.is_dir():
        raise DataError(f"data: the data directory must exist, got {directory}, correct --data or {DATA_VARIABLE}")
    return directory


def load(name: str, directory: Path | None = None) -> Dataset:
    """The data set of that name: "digits", or an .npz file inside directory."""
    if name == "digits":
        return digits()
    if not name.endswith(".npz"):
        raise DataError(f"data: name must be 'digits' or a file ending in .npz, got {name!r}")
    if directory is None:
        raise DataError(f"data: {name} needs a data directory, give --data or set {DATA_VARIABLE}")
    return npz(directory / name)


def split(y: np.ndarray, seed: int, fractions: Sequence[float] = FRACTIONS) -> Split:
    """A stratified, seeded split: each class is shuffled and cut at the rounded cumulative fractions.

    y: int [N].  fractions: train, validation, test; positive, sum 1.  Every index is in exactly one part.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1.0) > 1e-9:
        raise DataError(f"split: fractions must be three positive numbers with sum 1, got {list(fractions)}")
    cuts = np.cumsum(fractions)[:2]
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for label in np.unique(y):
        members = numpy_generator(seed, "split", int(label)).permutation(np.flatnonzero(y == label))
        for part, piece in zip(parts, np.split(members, np.rint(cuts * len(members)).astype(int)), strict=True):
            part.append(piece)
    train, val, test = (np.sort(np.concatenate(part)).astype(np.int64) for part in parts)
    return Split(train, val, test)


def class_sets(
    num_classes: int, num_clients: int, classes_per_client: int | Sequence[int], seed: int
) -> list[tuple[int, ...]]:
    """Which classes each client holds: random, every class held by a client, holders per class as even as can be.

    classes_per_client: a number, or [low, high], from which each client's number is drawn, both ends included.
    Each client takes the classes with the fewest holders so far, ties broken at random; so no class is left over
    once the clients' numbers add up to num_classes.
    """
    bounds = [classes_per_client] * 2 if isinstance(classes_per_client, int) else list(classes_per_client)
    if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1] <= num_classes:
        raise DataError(
            f"partition: classes_per_client must be between 1 and the data's {num_classes} classes, "
            f"a number or [low, high], got {classes_per_client}"
        )
    random = numpy_generator(seed, "classes")
    wanted = random.integers(bounds[0], bounds[1], size=num_clients, endpoint=True)
    if wanted.sum() < num_classes:
        raise DataError(
            f"partition: {num_clients} clients with {classes_per_client} classes each cannot hold all {num_classes} "
            f"classes, use more clients or more classes per client"
        )
    holders = np.zeros(num_classes, dtype=np.int64)
    sets = []
    for number in wanted:
        chosen = np.lexsort((random.random(num_classes), holders))[:number]
        holders[chosen] += 1
        sets.append(tuple(sorted(int(label) for label in chosen)))
    return sets


def partition(
    y: np.ndarray, whole: Split, num_clients: int, classes_per_client: int | Sequence[int], seed: int
) -> list[Split]:
    """Cut each part of a split into clients: a class's samples go, shuffled and in even shares, to its holders.

    Every sample goes to exactly one client, and a client's three parts hold the same classes (class_sets).
    """
    labels = np.unique(y)
    sets = class_sets(len(labels), num_clients, classes_per_client, seed)
    shares: list[dict[str, list[np.ndarray]]] = [{"train": [], "val": [], "test": []} for _ in sets]
    for position, label in enumerate(labels):
        holders = [client for client, held in enumerate(sets) if position in held]
        for name in ("train", "val", "test"):
            indices = getattr(whole, name)
            members = indices[y[indices] == label]
            if len(members) < len(holders):
                raise DataError(
                    f"partition: class {label} has {len(members)} {name} samples for its {len(holders)} clients, "
                    f"use fewer clients or fewer classes per client"
                )
            random = numpy_generator(seed, "partition-" + name, int(label))
            shuffled, order = random.permutation(members), random.permutation(holders)
            for client, piece in zip(order, np.array_split(shuffled, len(holders)), strict=True):
                shares[client][name].append(piece)
    return [Split(*(np.sort(np.concatenate(share[name])) for name in ("train", "val", "test"))) for share in shares]


def client_data(dataset: Dataset, part: Split) -> ClientData:
    """One client's images as tensors."""

    def tensors(indices: np.ndarray) -> Part:
        return Part(torch.from_numpy(dataset.x[indices]), torch.from_numpy(dataset.y[indices]))

    classes = tuple(int(label) for label in np.unique(dataset.y[part.train]))
    return ClientData(classes, tensors(part.train), tensors(part.val), tensors(part.test))


def class_counts(clients: Sequence[ClientData], num_classes: int) -> np.ndarray:
    """How many training images of each class each client holds: int64 [clients, num_classes]."""
    counts = [np.bincount(client.train.y.numpy(), minlength=num_classes) for client in clients]
    return np.stack(counts).astype(np.int64)
