"""Any data set as one .npz file of plain arrays: `x`, `y`, and if it has them `writer` and `test`."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fl.data.arrays import Dataset
from fl.data.files import DATA_VARIABLE
from fl.errors import DataError


def arrays(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file; no pickled objects."""
    if not path.is_file():
        raise DataError(f"data: there is no file {path}, give its directory with --data or {DATA_VARIABLE}")
    words = " and ".join(repr(name) for name in needed)
    if not zipfile.is_zipfile(path):
        raise DataError(f"data: {path} must be an .npz file with arrays {words}, it is not in that format")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [*needed, *(name for name in optional if name in archive.files)]
            return {name: np.asarray(archive[name]) for name in names}
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"data: {path} must be an .npz file with plain arrays {words}, got: {error}") from error


def npz(path: Path) -> Dataset:
    """A data set from an .npz file.

    x: [N, H, W] or [N, C, H, W], bytes (models see x / 255) or other numbers, taken as they are.  y: integer labels [N].
    writer: [N], integers or strings.  test: bool [N], true for the rows of the official test set.
    """
    content = arrays(path, ["x", "y"], ["writer", "test"])
    x, y, writer, test = (content.get(name) for name in ("x", "y", "writer", "test"))
    assert x is not None
    assert y is not None
    if x.ndim not in (3, 4) or y.shape != x.shape[:1] or len(y) == 0:
        raise DataError(
            f"data: {path} needs x of shape [N, H, W] or [N, C, H, W] and y of shape [N], "
            f"got {list(x.shape)} and {list(y.shape)}"
        )
    if x.dtype.kind not in "fiu" or y.dtype.kind not in "iu" or y.min() < 0 or not np.isfinite(x).all():
        raise DataError(f"data: {path} needs finite numbers in x and labels 0, 1, .. in y, got {x.dtype} and {y.dtype}")
    if writer is not None and (writer.shape != y.shape or writer.dtype.kind not in "iuUS"):
        raise DataError(
            f"data: {path} needs a writer's number or name for each image, got {writer.dtype} {writer.shape}"
        )
    if test is not None and (test.shape != y.shape or test.dtype != np.bool_ or test.all()):
        raise DataError(f"data: {path} needs test to be true for some images, false for others, got {test.dtype}")
    return Dataset(
        path.name,
        (x if x.dtype == np.uint8 else x.astype(np.float32)).reshape(len(x), -1, *x.shape[-2:]),
        y.astype(np.int64),
        int(y.max()) + 1,
        writer=None if writer is None else np.unique(writer, return_inverse=True)[1].astype(np.int64),
        test_rows=None if test is None or not test.any() else np.flatnonzero(test),
    )
