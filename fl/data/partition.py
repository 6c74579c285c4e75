"""Seeded splits: train / validation / test, then clients that each see a few classes, the paper's partition."""

from collections.abc import Sequence

import numpy as np

from fl.data.arrays import PARTS, Split
from fl.errors import DataError
from fl.seeds import numpy_generator

FRACTIONS = (0.6, 0.1, 0.3)


def split(
    y: np.ndarray, seed: int, fractions: Sequence[float] = FRACTIONS, test_rows: np.ndarray | None = None
) -> Split:
    """A stratified, seeded split: each class is shuffled and cut at the rounded cumulative fractions.

    y: int [N].  fractions: train, validation, test; positive, sum 1.  Every index is in exactly one part.
    test_rows: an official test set; it is the test part, and the rest is cut in proportion to train and validation.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1.0) > 1e-9:
        raise DataError(f"split: fractions must be three positive numbers with sum 1, got {list(fractions)}")
    official = np.zeros(len(y), dtype=bool)
    cuts = np.cumsum(fractions)[:2]
    if test_rows is not None:
        official[test_rows] = True
        cuts = np.array([fractions[0] / (fractions[0] + fractions[1]), 1.0])
    parts: tuple[list[np.ndarray], ...] = ([], [], [np.flatnonzero(official)])
    for label in np.unique(y):
        members = numpy_generator(seed, "split", int(label)).permutation(np.flatnonzero((y == label) & ~official))
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
        for name in PARTS:
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
    return [Split(*(np.sort(np.concatenate(share[name])) for name in PARTS)) for share in shares]
