"""Data sets read from their files: what comes out is what went in, and a sentence for whatever is missing or damaged."""

import gzip
import json
import lzma
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl import data
from fl.errors import DataError

RANDOM = np.random.default_rng(0)
PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def idx_bytes(array: np.ndarray) -> bytes:
    kind = {np.dtype("u1"): 0x08, np.dtype("i4"): 0x0C}[array.dtype]
    return (
        bytes([0, 0, kind, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


def write_mnist(folder: Path, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    """12 training and 5 test images; returns all x and y."""
    folder.mkdir(parents=True, exist_ok=True)
    x = RANDOM.integers(0, 256, (17, 4, 6), dtype=np.uint8)
    y = np.arange(17, dtype=np.uint8) % 3
    for part, rows in (("train", slice(0, 12)), ("t10k", slice(12, 17))):
        for name, array in ((f"{part}-images-idx3-ubyte", x[rows]), (f"{part}-labels-idx1-ubyte", y[rows])):
            (folder / (name + suffix)).write_bytes(PACK[suffix](idx_bytes(array)))
    return x, y


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_load_from_the_directory_or_its_folder(tmp_path: Path, name: str, suffix: str) -> None:
    for folder in (tmp_path / "flat", tmp_path / "deep" / name):
        x, y = write_mnist(folder, suffix)
    for directory in (tmp_path / "deep", tmp_path / "deep" / name):
        dataset = data.load(name, directory)
        assert np.array_equal(dataset.x[:, 0], x)
        assert np.array_equal(dataset.y, y)
        assert dataset.test_rows is not None
        assert dataset.test_rows.tolist() == [12, 13, 14, 15, 16]
        assert (dataset.num_classes, dataset.input_shape, dataset.writer) == (3, (1, 4, 6), None)


def qmnist_rows(labels: np.ndarray, more: int) -> np.ndarray:
    rows = RANDOM.integers(0, 500, (len(labels) + more, 8)).astype("i4")
    rows[: len(labels), 0] = labels
    return rows


def test_mnists_writers_come_from_qmnist(tmp_path: Path) -> None:
    _, y = write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist-writers").mkdir()
    train, test = qmnist_rows(y[:12], 0), qmnist_rows(y[12:], 9)
    for part, rows in (("train", train), ("test", test)):
        path = tmp_path / "mnist-writers" / f"qmnist-{part}-labels-idx2-int.gz"
        path.write_bytes(gzip.compress(idx_bytes(rows)))
    dataset = data.load("mnist", tmp_path)
    assert dataset.writer is not None
    assert np.array_equal(dataset.writer, np.concatenate([train[:, 2], test[:5, 2]]))
    train[3, 0] += 1
    path = tmp_path / "mnist-writers" / "qmnist-train-labels-idx2-int.gz"
    path.write_bytes(gzip.compress(idx_bytes(train)))
    with pytest.raises(DataError, match="does not belong to these images"):
        data.load("mnist", tmp_path)


CIFAR_X = RANDOM.integers(0, 256, (18, 3, 32, 32), dtype=np.uint8)
CIFAR_Y = RANDOM.integers(0, 10, 18)
CIFAR_BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def write_cifar(folder: Path, form: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if form == "npz":
        images = np.moveaxis(CIFAR_X, 1, -1)  # as it is often kept
        split = {"x_train": images[:15], "y_train": CIFAR_Y[:15, None], "x_test": images[15:], "y_test": CIFAR_Y[15:]}
        np.savez(folder / "cifar10.npz", **split)
        return
    for number, name in enumerate(CIFAR_BATCHES):
        x, y = (array[3 * number : 3 * number + 3] for array in (CIFAR_X, CIFAR_Y))
        if form == "python":
            batch = {b"data": x.reshape(3, -1), b"labels": y.tolist(), b"batch_label": b"one", b"filenames": [b"a.png"]}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        else:
            rows = np.concatenate([y[:, None].astype(np.uint8), x.reshape(3, -1)], 1)
            (folder / f"{name}.bin{form}").write_bytes(PACK[form](rows.tobytes()))


@pytest.mark.parametrize("form", ["python", "npz", *PACK])
@pytest.mark.parametrize("folder", ["cifar10", "cifar-10-batches-py", "."])
def test_cifar_loads_in_each_of_its_forms(tmp_path: Path, form: str, folder: str) -> None:
    write_cifar(tmp_path / folder, form)
    dataset = data.load("cifar10", tmp_path)
    assert np.array_equal(dataset.x, CIFAR_X)
    assert np.array_equal(dataset.y, CIFAR_Y)
    assert dataset.test_rows is not None
    assert dataset.test_rows.tolist() == [15, 16, 17]
    seen = data.arrays.images(dataset.x)
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen, CIFAR_X / 255, rtol=1e-6)


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


def test_a_pickle_can_call_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "cifar10", "python")
    (tmp_path / "cifar10" / "data_batch_2").write_bytes(pickle.dumps({b"data": Harmful()}, protocol=2))
    with pytest.raises(DataError, match=r"one of CIFAR-10's Python batches, got: it asks for posix\.mkdir"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "harm").exists()


def write_leaf(root: Path) -> None:
    for part, users in (("train", ["f01", "f00"]), ("test", ["f00", "f01"])):
        (root / part).mkdir(parents=True)
        held = {user: {"x": [[float(user[-1]), i, 0.5, 1.0] for i in range(3)], "y": [0, 1, 4]} for user in users}
        content = {"users": users, "num_samples": [3, 3], "user_data": held}
        (root / part / "all_data_0.json").write_text(json.dumps(content))


def test_leaf_files_keep_their_writers_and_their_test_set(tmp_path: Path) -> None:
    write_leaf(tmp_path / "femnist")
    for directory in (tmp_path, tmp_path / "femnist"):
        dataset = data.load("femnist", directory)
        assert dataset.x.shape == (12, 1, 2, 2)
        assert dataset.writer is not None
        assert dataset.test_rows is not None
        assert dataset.writer.tolist() == dataset.x[:, 0, 0, 0].astype(int).tolist()
        assert dataset.test_rows.tolist() == [0, 1, 2, 3, 4, 5]  # files in alphabetical order: test before train
        assert dataset.num_classes == 5


def test_npz_files_may_name_writers_and_a_test_set(tmp_path: Path) -> None:
    x, y = RANDOM.integers(0, 256, (6, 4, 4), dtype=np.uint8), np.arange(6) % 2
    names, test = np.array(["b", "a", "b", "c", "a", "a"]), np.arange(6) > 3
    np.savez(tmp_path / "own.npz", x=x, y=y, writer=names, test=test)
    dataset = data.load("own.npz", tmp_path)
    assert dataset.writer is not None
    assert dataset.test_rows is not None
    assert dataset.writer.tolist() == [1, 0, 1, 2, 0, 0]
    assert dataset.test_rows.tolist() == [4, 5]
    assert dataset.x.dtype == np.uint8
    (tmp_path / "own.npz").rename(tmp_path / "femnist.npz")
    assert np.array_equal(data.load("femnist", tmp_path).x, dataset.x)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mnist", r"mnist needs the file train-images-idx3-ubyte \(or \.gz, \.xz\) in .*: take the four files"),
        ("fashion-mnist", "fashion-mnist needs the file train-images-idx3-ubyte .*dataset-fashion-mnist, `dpkg -L`"),
        ("cifar10", r"cifar10 needs the file data_batch_1\.bin .*: take CIFAR-10's binary or Python version"),
        ("femnist", "femnist needs LEAF's train/.*json and test/.*json in a folder femnist"),
    ],
)
def test_a_missing_data_set_says_which_file_to_put_where(tmp_path: Path, name: str, sentence: str) -> None:
    for directory in (None, tmp_path):
        with pytest.raises(DataError, match=sentence) as caught:
            data.load(name, directory)
        assert "\n" not in str(caught.value)
        assert "--data" in str(caught.value) or str(tmp_path) in str(caught.value)


def damages() -> list[tuple[str, str, Callable[[bytes], bytes], str]]:
    """(data set, file, what is done to it, the sentence)."""
    images, labels = "mnist/train-images-idx3-ubyte.gz", "mnist/t10k-labels-idx1-ubyte.gz"
    raw = gzip.decompress
    return [
        ("mnist", images, lambda b: b[:40], "cannot be read"),
        ("mnist", images, lambda b: b"no gzip", "cannot be read"),
        ("mnist", images, lambda b: gzip.compress(raw(b)[:-1]), r"must have 304 bytes for its shape \[12, 4, 6\]"),
        ("mnist", images, lambda b: gzip.compress(raw(b)[:6]), "must be an IDX file"),
        ("mnist", images, lambda b: gzip.compress(b"\0\0\x0d\3" + raw(b)[4:]), "must be an IDX file"),
        (
            "mnist",
            images,
            lambda b: gzip.compress(b"\0\0\x08\3" + b"\xff" * 12),
            "must have 79228162458924105385300197391 bytes",
        ),
        ("mnist", labels, lambda b: gzip.compress(idx_bytes(np.zeros(4, "u1"))), "5 t10k images and 4 labels"),
        (
            "mnist",
            labels,
            lambda b: gzip.compress(idx_bytes(np.zeros((5, 1), "u1"))),
            "must hold bytes in 1 dimensions",
        ),
        ("cifar10", "cifar10/data_batch_3.bin", lambda b: b[:-1], "records of 3073 bytes, it has 9218"),
        ("cifar10", "cifar10/data_batch_3.bin", lambda b: b"", "records of 3073 bytes, it has 0"),
        ("cifar10", "cifar10/data_batch_3.bin", lambda b: b"\x0b" + b[1:], "labels 0 to 9, it does not"),
        ("femnist", "femnist/train/all_data_0.json", lambda b: b[:-9], "must be a LEAF file with users"),
        ("femnist", "femnist/train/all_data_0.json", lambda b: b"{}", "must be a LEAF file with users"),
        ("femnist", "femnist/train/all_data_0.json", lambda b: b.replace(b"[0, 1, 4]", b"[0, 1]"), "a label for each"),
        ("femnist", "femnist/train/all_data_0.json", lambda b: b.replace(b"0.5, 1.0]", b"0.5]"), "square flat images"),
        ("femnist", "femnist/train/all_data_0.json", lambda b: b.replace(b"0.5", b"NaN"), "finite pixels"),
    ]


@pytest.mark.parametrize(("name", "file", "damage", "sentence"), damages())
def test_a_damaged_file_is_one_sentence(
    tmp_path: Path, name: str, file: str, damage: Callable[[bytes], bytes], sentence: str
) -> None:
    write_mnist(tmp_path / "mnist", ".gz")
    write_cifar(tmp_path / "cifar10", "")
    write_leaf(tmp_path / "femnist")
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=sentence) as caught:
        data.load(name, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["python", "npz"])
def test_a_damaged_cifar_batch_is_one_sentence(tmp_path: Path, form: str) -> None:
    write_cifar(tmp_path, form)
    path = tmp_path / ("cifar10.npz" if form == "npz" else "test_batch")
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            data.load("cifar10", tmp_path)
        assert "\n" not in str(caught.value)


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_flip_and_crop_shift_and_mirror_whole_images(n: int, channels: int, height: int, width: int, seed: int) -> None:
    x = torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(seed)) + 1  # no zero pixel
    changed = data.flip_crop(x, torch.Generator().manual_seed(seed))
    assert torch.equal(changed, data.flip_crop(x, torch.Generator().manual_seed(seed)))
    assert changed.shape == x.shape
    for before, after in zip(x, changed, strict=True):
        candidates = [
            torch.nn.functional.pad(image, [4] * 4)[:, down : down + height, right : right + width]
            for image in (before, before.flip(2))
            for down in range(9)
            for right in range(9)
        ]
        assert any(torch.equal(after, candidate) for candidate in candidates)


def test_every_flip_and_shift_occurs_about_as_often() -> None:
    image = torch.arange(1.0, 82.0).reshape(1, 1, 9, 9).expand(4000, 1, 9, 9)
    centres = data.flip_crop(image, torch.Generator().manual_seed(0))[:, 0, 4, 4].long()
    counts = torch.bincount(centres, minlength=82)[
        1:
    ]  # each pixel is the centre for one shift, or for its mirror image
    assert (counts - 4000 / 81).abs().max() < 5 * (4000 / 81) ** 0.5  # five standard deviations of a Poisson count
