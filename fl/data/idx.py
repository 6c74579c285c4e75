"""MNIST and Fashion-MNIST in their own IDX files, plain, gzip or xz; QMNIST's writers where they lie beside MNIST.

IDX: two zero bytes, a type code, the number of dimensions, each dimension as a big-endian uint32, then the values.
"""

from pathlib import Path

import numpy as np

from fl.data.arrays import Dataset
from fl.data.files import find, need, read
from fl.errors import DataError

_TYPES: dict[int, np.dtype] = {0x08: np.dtype("u1"), 0x0C: np.dtype(">i4")}
_SOURCES = {
    "mnist": "take the four files of MNIST",
    "fashion-mnist": "install Debian's package dataset-fashion-mnist, `dpkg -L` lists the directory of its files",
}
_WRITER = 2  # QMNIST's column of the writer's number


def idx(path: Path) -> np.ndarray:
    """The array of an IDX file, in its own type."""
    content = read(path)
    kind, rank = (content[2], content[3]) if len(content) >= 4 and content[:2] == b"\0\0" else (0, 0)
    if kind not in _TYPES or not 1 <= rank <= 4 or len(content) < 4 + 4 * rank:
        raise DataError(f"data: {path} must be an IDX file of bytes or 32-bit integers, it is not in that format")
    shape = [int(size) for size in np.frombuffer(content, ">u4", rank, 4)]
    expected = 4 + 4 * rank + int(np.prod(shape, dtype=object)) * _TYPES[kind].itemsize
    if len(content) != expected:
        raise DataError(f"data: {path} must have {expected} bytes for its shape {shape}, it has {len(content)}")
    return np.frombuffer(content, _TYPES[kind], offset=4 + 4 * rank).reshape(shape)


def mnist(name: str, directory: Path | None) -> Dataset:
    """The 60,000 + 10,000 images, the last 10,000 of them the official test set. name: "mnist" or "fashion-mnist"."""
    x: list[np.ndarray] = []
    y: list[np.ndarray] = []
    writers: list[np.ndarray] = []
    for part, qmnist in (("train", "train"), ("t10k", "test")):
        for kind, rank, arrays in (("images", 3, x), ("labels", 1, y)):
            names = [f"{part}-{kind}-idx{rank}-ubyte", f"{part}-{kind}.idx{rank}-ubyte"]
            path = need(directory, [name], names, name, _SOURCES[name])
            array = idx(path)
            if array.ndim != rank or array.dtype != np.uint8:
                raise DataError(f"data: {path} must hold bytes in {rank} dimensions, got {array.dtype} {array.shape}")
            arrays.append(array)
        if len(x[-1]) != len(y[-1]):
            raise DataError(
                f"data: {name} has {len(x[-1])} {part} images and {len(y[-1])} labels, they must be as many"
            )
        if name == "mnist" and directory is not None:
            extended = find(directory, ["mnist", "mnist-writers", "qmnist"], [f"qmnist-{qmnist}-labels-idx2-int"])
            writers += [] if extended is None else [_writers(extended, y[-1])]
    labels = np.concatenate(y).astype(np.int64)
    return Dataset(
        name,
        np.concatenate(x)[:, None],
        labels,
        int(labels.max()) + 1,
        writer=np.concatenate(writers) if len(writers) == 2 else None,
        test_rows=np.arange(len(y[0]), len(labels)),
    )


def _writers(path: Path, labels: np.ndarray) -> np.ndarray:
    """Who wrote each MNIST digit, from QMNIST's extended labels, whose first rows are MNIST's own."""
    rows = idx(path)
    if rows.ndim != 2 or rows.shape[1] <= _WRITER or len(rows) < len(labels):
        raise DataError(f"data: {path} must have a row of QMNIST's extended labels for each image, got {rows.shape}")
    rows = rows[: len(labels)]
    if not np.array_equal(rows[:, 0], labels):
        raise DataError(f"data: {path} does not belong to these images, its classes differ from their labels")
    return rows[:, _WRITER].astype(np.int64)
