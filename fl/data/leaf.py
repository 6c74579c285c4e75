"""FEMNIST as LEAF writes it: JSON files with "users" and, for each, "user_data" of flat images x and labels y.

Caldas et al. 2018 (arXiv:1812.01097).
"""

import json
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from fl.data.arrays import Dataset
from fl.data.files import DATA_VARIABLE, find, read
from fl.data.npz import npz
from fl.errors import DataError


def femnist(directory: Path | None) -> Dataset:
    """Images by writer from femnist.npz, or from all JSON files under femnist/; those under a folder test/ are the test set."""
    single = None if directory is None else find(directory, ["femnist"], ["femnist.npz"])
    if single is not None:
        return npz(single)
    root = Path() if directory is None else directory / "femnist" if (directory / "femnist").is_dir() else directory
    files = [] if directory is None else sorted(root.rglob("*.json"))
    if not files:
        raise DataError(
            f"data: femnist needs LEAF's train/*.json and test/*.json in a folder femnist of the data directory, or one "
            f"femnist.npz with x, y and writer; give the directory with --data or {DATA_VARIABLE}"
        )
    pieces = [(path, user, *_user(path, user, data)) for path in files for user, data in _users(path)]
    if len({x.shape[1] for _, _, x, _ in pieces}) != 1:
        raise DataError(f"data: {root} must hold images of one size, got several")
    x = np.concatenate([piece[2] for piece in pieces])
    y = np.concatenate([piece[3] for piece in pieces])
    side = isqrt(x.shape[1])
    lengths = [len(piece[3]) for piece in pieces]
    in_test = np.repeat(["test" in path.relative_to(root).parts[:-1] for path, *_ in pieces], lengths)
    _, writer = np.unique(np.repeat([piece[1] for piece in pieces], lengths), return_inverse=True)
    rows = np.flatnonzero(in_test) if in_test.any() and not in_test.all() else None
    images = x.reshape(-1, 1, side, side)
    return Dataset("femnist", images, y, int(y.max()) + 1, writer=writer.astype(np.int64), test_rows=rows)


def _users(path: Path) -> list[tuple[str, Any]]:
    try:
        content = json.loads(read(path))
        return [(str(user), content["user_data"][user]) for user in content["users"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"data: {path} must be a LEAF file with users and user_data, got: {error!r}") from error


def _user(path: Path, user: str, data: Any) -> tuple[np.ndarray, np.ndarray]:
    try:
        x, y = np.asarray(data["x"], dtype=np.float32), np.asarray(data["y"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"data: {path} must hold x and y of user {user}, got: {error!r}") from error
    if x.ndim != 2 or y.shape != (len(x),) or len(y) == 0 or isqrt(x.shape[1]) ** 2 != x.shape[1]:
        raise DataError(f"data: {path} must hold square flat images and a label for each of user {user}, got {x.shape}")
    if y.dtype.kind not in "iu" or y.min() < 0 or not np.isfinite(x).all():
        raise DataError(f"data: {path} must hold finite pixels and labels 0, 1, .. of user {user}")
    return x, y.astype(np.int64)
