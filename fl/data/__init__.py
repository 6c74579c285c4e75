"""Data sets as arrays, and seeded splits: train / validation / test, then clients that each see a part.

digits          scikit-learn's 1,797 handwritten digits, 8 x 8, real images that ship inside that package
mnist           IDX files, with QMNIST's writers where they are there          fashion-mnist   IDX files
cifar10         Python batches, binary batches or cifar10.npz                  femnist         LEAF's JSON, or femnist.npz
<file>.npz      arrays `x`, `y` and, if it has them, `writer` and `test`
All but digits are looked for in the data directory (--data or QUPEDKERN_DATA) and in its folder of the same name.
"""

from pathlib import Path

import numpy as np

from fl.data.arrays import ClientData as ClientData
from fl.data.arrays import Dataset as Dataset
from fl.data.arrays import Part as Part
from fl.data.arrays import Split as Split
from fl.data.arrays import class_counts as class_counts
from fl.data.arrays import client_data as client_data
from fl.data.arrays import shrunk as shrunk
from fl.data.augment import AUGMENTATIONS as AUGMENTATIONS
from fl.data.augment import flip_crop as flip_crop
from fl.data.cifar import cifar10
from fl.data.files import DATA_VARIABLE as DATA_VARIABLE
from fl.data.files import data_directory as data_directory
from fl.data.idx import mnist
from fl.data.leaf import femnist
from fl.data.npz import npz
from fl.data.partition import FRACTIONS as FRACTIONS
from fl.data.partition import class_sets as class_sets
from fl.data.partition import partition as partition
from fl.data.partition import split as split
from fl.data.plan import Plan as Plan
from fl.data.plan import clients_data as clients_data
from fl.data.plan import parts as parts
from fl.errors import DataError

FORMS = {  # image (channels, height, width), number of classes
    "digits": ((1, 8, 8), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "femnist": ((1, 28, 28), 62),
}
NAMES = tuple(FORMS)
EMBEDDED = ("digits",)  # needs no directory


def digits() -> Dataset:
    """scikit-learn's handwritten digits: x [1797, 1, 8, 8] scaled from 0..16 to [0, 1], y in 0..9."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"data: digits needs scikit-learn ({error}), install it with qupedkern's extra 'fl'") from error
    bunch = load_digits()
    x = (bunch.images[:, None] / 16.0).astype(np.float32)  # 16: the largest pixel value in the file
    return Dataset("digits", x, bunch.target.astype(np.int64), 10)


def load(name: str, directory: Path | None = None) -> Dataset:
    """The data set of that name, one of NAMES or a file ending in .npz. Raises DataError, one sentence."""
    if name == "digits":
        return digits()
    if name in ("mnist", "fashion-mnist"):
        return mnist(name, directory)
    if name == "cifar10":
        return cifar10(directory)
    if name == "femnist":
        return femnist(directory)
    form(name)
    if directory is None:
        raise DataError(f"data: {name} needs a data directory, give --data or set {DATA_VARIABLE}")
    return npz(directory / name)


def form(name: str) -> tuple[tuple[int, int, int], int] | None:
    """(shape of an image, number of classes) of a data set, without its files; None for an .npz file, which alone tells."""
    if name not in FORMS and not name.endswith(".npz"):
        raise DataError(f"data: name must be one of {', '.join(NAMES)}, or a file ending in .npz, got {name!r}")
    return FORMS.get(name)
