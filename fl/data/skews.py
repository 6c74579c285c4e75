"""Partitions by shares: which part of every class each client receives, the same in train, validation and test.

So a client's test images follow the distribution of its training images to within rounding, and all clients' test parts
together are the whole test part. Every image goes to exactly one client and no client is left without any.
"""

import numpy as np

from fl.data.arrays import PARTS, Split
from fl.errors import DataError
from fl.seeds import numpy_generator

LEAST = {"train": 2, "val": 1, "test": 1}  # images of a client: batch norm cannot train on a single one


def dirichlet(num_classes: int, num_clients: int, alpha: float, seed: int) -> np.ndarray:
    """Shares [classes, clients], each class dealt by a Dirichlet(alpha) draw: the smaller alpha, the fewer holders.

    Yurochkin et al. 2019 (arXiv:1905.12022), section 4.
    """
    if not 0 < alpha < float("inf"):
        raise DataError(f"partition: alpha must be positive and finite, got {alpha}")
    gammas = numpy_generator(seed, "dirichlet").standard_gamma(alpha, size=(num_classes, num_clients))
    gammas += np.finfo(float).tiny  # a tiny alpha may draw nothing but zeros for a class
    return gammas / gammas.sum(1, keepdims=True)


def quantity(num_classes: int, num_clients: int, sigma: float, seed: int) -> np.ndarray:
    """Shares [classes, clients], alike for every class, proportional to lognormal(0, sigma) sizes of the clients."""
    if not 0 <= sigma < float("inf"):
        raise DataError(f"partition: sigma must be at least 0 and finite, got {sigma}")
    normal = numpy_generator(seed, "quantity").standard_normal(num_clients)
    sizes = np.exp(sigma * (normal - normal.max()))  # the largest is 1, so that no sigma overflows
    return np.tile(sizes / sizes.sum(), (num_classes, 1))


def even(num_classes: int, num_clients: int) -> np.ndarray:
    """Shares [classes, clients], all alike: clients of one distribution."""
    return np.full((num_classes, num_clients), 1 / num_clients)


def shards(class_sizes: np.ndarray, num_clients: int, shards_per_client: int, seed: int) -> np.ndarray:
    """Shares [classes, clients]: images sorted by class, cut into equal shards, dealt at random, so many to each client.

    McMahan et al. 2017 (arXiv:1602.05629), section 3, with 2 shards a client.
    """
    if shards_per_client < 1:
        raise DataError(f"partition: shards_per_client must be at least 1, got {shards_per_client}")
    count = num_clients * shards_per_client
    owner = numpy_generator(seed, "shards").permutation(count) % num_clients
    ends = np.cumsum(class_sizes) / class_sizes.sum()
    starts = np.concatenate([[0.0], ends[:-1]])
    shares = np.zeros((len(class_sizes), num_clients))
    for shard, client in enumerate(owner):
        overlap = np.minimum(ends, (shard + 1) / count) - np.maximum(starts, shard / count)
        shares[:, client] += np.maximum(overlap, 0) / (ends - starts)
    return shares / shares.sum(1, keepdims=True)


def cut(y: np.ndarray, whole: Split, shares: np.ndarray, seed: int) -> list[Split]:
    """Cut each part of a split: of class c, client k takes shares[c, k], rounded so that every image is taken once.

    shares: [classes in y, clients], rows with sum 1.  A client that rounding leaves with fewer images than LEAST takes
    them from those who have most, of its own classes as far as it can.
    """
    clients = shares.shape[1]
    held: dict[str, list[list[int]]] = {name: [[] for _ in range(clients)] for name in PARTS}
    for position, label in enumerate(np.unique(y)):
        for name in PARTS:
            indices = getattr(whole, name)
            members = indices[y[indices] == label]
            random = numpy_generator(seed, "cut-" + name, int(label))
            shuffled, order = random.permutation(members), random.permutation(clients)
            ends = np.rint(np.cumsum(shares[position, order]) * len(members)).astype(int)
            for client, piece in zip(order, np.split(shuffled, ends[:-1]), strict=True):
                held[name][client].extend(piece.tolist())
    for name in PARTS:
        _share_out(y, held[name], held["train"], name)
    return [Split(*(np.sort(np.array(held[name][k], dtype=np.int64)) for name in PARTS)) for k in range(clients)]


def _share_out(y: np.ndarray, held: list[list[int]], train: list[list[int]], name: str) -> None:
    """Move single images, in place, until every client has LEAST[name]."""
    least = LEAST[name]
    if sum(map(len, held)) < least * len(held):
        raise DataError(
            f"partition: {len(held)} clients need {least} {name} images each, there are {sum(map(len, held))}, "
            f"use fewer clients or more data"
        )
    for client, mine in enumerate(held):
        classes = {int(y[index]) for index in train[client]}
        while len(mine) < least:
            donors = [other for other in held if len(other) > least]
            fitting = [other for other in donors if any(int(y[index]) in classes for index in other)]
            donor = max(fitting or donors, key=len)
            taken = next((index for index in donor if int(y[index]) in classes), donor[-1])
            donor.remove(taken)
            mine.append(taken)


def by_writer(
    writer: np.ndarray | None,
    num_clients: int,
    seed: int,
    fractions: tuple[float, ...],
    writers_per_client: int | None = None,
) -> list[Split]:
    """Whole writers to clients, and each client's images cut into its three parts.

    writers_per_client: so many random ones each, the rest is left out; None: all of them, about as many to each.
    """
    if writer is None:
        raise DataError("partition: writers needs a data set that says who wrote each image, this one does not")
    writers = np.unique(writer)
    wanted = num_clients * (writers_per_client or 1)
    if len(writers) < wanted:
        raise DataError(f"partition: {num_clients} clients need {wanted} writers, there are {len(writers)}")
    order = numpy_generator(seed, "writers").permutation(writers)[: None if writers_per_client is None else wanted]
    parts = []
    for client, mine in enumerate(np.array_split(order, num_clients)):
        rows = numpy_generator(seed, "writer-split", client).permutation(np.flatnonzero(np.isin(writer, mine)))
        if len(rows) < sum(LEAST.values()):
            raise DataError(
                f"partition: client {client} needs {sum(LEAST.values())} images of its writers, got {len(rows)}, "
                f"use fewer clients"
            )
        ends = np.rint(np.cumsum(fractions)[:2] * len(rows)).astype(int)
        ends[0] = np.clip(ends[0], LEAST["train"], len(rows) - 2)
        ends[1] = np.clip(ends[1], ends[0] + 1, len(rows) - 1)
        parts.append(Split(*(np.sort(piece) for piece in np.split(rows, ends))))
    return parts
