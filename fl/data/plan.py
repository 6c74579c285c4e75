"""How a data set is cut into clients, as the configuration says it."""

from dataclasses import dataclass, replace

import numpy as np

from fl.data import skews
from fl.data.arrays import ClientData, Dataset, Split, client_data
from fl.data.partition import FRACTIONS, partition, split
from fl.errors import DataError
from fl.seeds import numpy_generator

PARTITIONS = ("classes", "dirichlet", "shards", "quantity", "features", "writers", "iid")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What each client receives of a data set.

    partition: "classes"    `classes_per_client` random classes each, a number or [low, high]: the paper's
               "dirichlet"  each class by a Dirichlet(`alpha`) draw over the clients
               "shards"     `shards_per_client` equal pieces of the images sorted by class
               "quantity"   sizes in proportion to lognormal(0, `sigma`), classes alike
               "features"   classes and sizes alike; client k of K adds normal noise of sd `noise` (k + 1) / K to its pixels
               "writers"    whole writers: `writers_per_client` random ones each, or all, about as many to each
               "iid"        classes and sizes alike
    fractions: train, validation, test.  official_test: take the data's own test set as the test part.
    samples: the most training images a client may keep, chosen at random, else all.
    shrink: replace each block of so many by so many pixels by its mean.
    """

    partition: str = "classes"
    classes_per_client: int | tuple[int, int] = (3, 4)
    alpha: float = 0.5
    shards_per_client: int = 2
    sigma: float = 1.0
    noise: float = 0.3
    writers_per_client: int | None = None
    fractions: tuple[float, float, float] = FRACTIONS
    official_test: bool = False
    samples: int | None = None
    shrink: int = 1

    def __post_init__(self) -> None:
        if self.partition not in PARTITIONS:
            raise ValueError(f"partition must be one of {', '.join(PARTITIONS)}, got {self.partition!r}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.writers_per_client is not None and self.writers_per_client < 1:
            raise ValueError(f"writers_per_client must be at least 1, got {self.writers_per_client}")
        if self.shrink < 1:
            raise ValueError(f"shrink must be at least 1, got {self.shrink}")
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise must be at least 0 and finite, got {self.noise}")
        if self.partition == "writers" and self.official_test:
            raise ValueError("official_test cannot be had with partition 'writers', which splits each writer's images")


def parts(dataset: Dataset, plan: Plan, num_clients: int, seed: int) -> list[Split]:
    """Each client's rows of the data set, by the plan and the seed."""
    y = dataset.y
    if plan.partition == "writers":
        chosen = skews.by_writer(dataset.writer, num_clients, seed, plan.fractions, plan.writers_per_client)
    else:
        if plan.official_test and dataset.test_rows is None:
            raise DataError(f"data: {dataset.name} has no official test set, leave official_test out")
        whole = split(y, seed, plan.fractions, dataset.test_rows if plan.official_test else None)
        if plan.partition == "classes":
            chosen = partition(y, whole, num_clients, plan.classes_per_client, seed)
        else:
            chosen = skews.cut(y, whole, _shares(y, plan, num_clients, seed), seed)
    if plan.samples is None:
        return chosen
    return [_limited(one, plan.samples, seed, client) for client, one in enumerate(chosen)]


def _shares(y: np.ndarray, plan: Plan, num_clients: int, seed: int) -> np.ndarray:
    labels, sizes = np.unique(y, return_counts=True)
    if plan.partition == "dirichlet":
        return skews.dirichlet(len(labels), num_clients, plan.alpha, seed)
    if plan.partition == "shards":
        return skews.shards(sizes, num_clients, plan.shards_per_client, seed)
    if plan.partition == "quantity":
        return skews.quantity(len(labels), num_clients, plan.sigma, seed)
    return skews.even(len(labels), num_clients)


def _limited(part: Split, samples: int, seed: int, client: int) -> Split:
    if len(part.train) <= samples:
        return part
    chosen = numpy_generator(seed, "samples", client).permutation(part.train)[:samples]
    return replace(part, train=np.sort(chosen))


def clients_data(dataset: Dataset, plan: Plan, num_clients: int, seed: int) -> list[ClientData]:
    """What each client holds, as tensors."""
    step = plan.noise / num_clients if plan.partition == "features" else 0.0
    return [
        client_data(dataset, part, shrink=plan.shrink, noise=step * (client + 1), seed=seed, client=client)
        for client, part in enumerate(parts(dataset, plan, num_clients, seed))
    ]
