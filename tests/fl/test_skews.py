"""Partitions by shares, shards and writers: laws by property."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fl import data
from fl.data import skews
from fl.data.arrays import PARTS
from fl.errors import DataError

SHARED = ("dirichlet", "shards", "quantity", "features", "iid")


@st.composite
def cases(draw: st.DrawFn) -> tuple[data.Dataset, data.Plan, int, int]:
    """(data set, plan, clients, seed), of uneven classes, with images enough for every client."""
    seed, clients = draw(st.integers(0, 2**32)), draw(st.integers(1, 9))
    sizes = draw(st.lists(st.integers(30, 90), min_size=1, max_size=5))
    random = np.random.default_rng(seed)
    y = random.permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)
    plan = data.Plan(
        partition=draw(st.sampled_from((*SHARED, "writers"))),
        alpha=draw(st.sampled_from([0.001, 0.1, 1.0, 100.0])),
        sigma=draw(st.sampled_from([0.0, 0.5, 3.0, 50.0])),
        shards_per_client=draw(st.integers(1, 4)),
    )
    # at least 5 images a writer: 30 in all, 6 writers a client at most
    writer = np.arange(len(y)) % min(len(y) // 5, draw(st.integers(clients, 3 * clients)))
    clients = min(clients, len(np.unique(writer)), len(y) // 30 + 1)
    return data.Dataset("drawn", np.zeros((len(y), 1, 1, 1)), y, len(sizes), writer=writer), plan, clients, seed


def rows(parts: Sequence[data.Split], names: Sequence[str] = PARTS) -> np.ndarray:
    return np.concatenate([getattr(part, name) for part in parts for name in names])


@given(cases())
def test_every_image_goes_to_one_client_and_none_is_left_without(
    case: tuple[data.Dataset, data.Plan, int, int],
) -> None:
    dataset, plan, clients, seed = case
    parts = data.parts(dataset, plan, clients, seed)
    assert len(parts) == clients
    assert np.array_equal(np.sort(rows(parts)), np.arange(len(dataset.y)))
    for part in parts:
        assert len(part.train) >= 2
        assert min(len(part.val), len(part.test)) >= 1
    if plan.partition != "writers":
        whole = data.split(dataset.y, seed)
        for name in PARTS:
            assert np.array_equal(np.sort(rows(parts, [name])), getattr(whole, name))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32))
def test_writers_may_be_counted_out(clients: int, each: int, seed: int) -> None:
    writer = np.arange(240) % 12
    dataset = data.Dataset("drawn", np.zeros((240, 1, 1, 1)), np.zeros(240, np.int64), 1, writer=writer)
    parts = data.parts(dataset, data.Plan(partition="writers", writers_per_client=each), clients, seed)
    held = [set(writer[rows([part])]) for part in parts]
    assert [len(mine) for mine in held] == [each] * clients
    assert len(set().union(*held)) == each * clients
    assert [len(rows([part])) for part in parts] == [20 * each] * clients


@given(cases())
@settings(max_examples=20)
def test_a_seed_fixes_the_partition(case: tuple[data.Dataset, data.Plan, int, int]) -> None:
    dataset, plan, clients, seed = case
    one, two = (rows(data.parts(dataset, plan, clients, seed)) for _ in range(2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, rows(data.parts(dataset, plan, clients, seed + 1)))


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32), st.sampled_from(SHARED))
def test_local_test_images_follow_the_local_training_images(
    num_classes: int, clients: int, seed: int, kind: str
) -> None:
    """Counts of both parts are within 1 of share times class size; those that are rounded up to LEAST are left out."""
    sizes = np.array([200, 320, 110, 90, 270, 60])[:num_classes]
    y = np.repeat(np.arange(num_classes), sizes)
    whole = data.split(y, seed)
    shares = {
        "dirichlet": lambda: skews.dirichlet(num_classes, clients, 0.5, seed),
        "quantity": lambda: skews.quantity(num_classes, clients, 1.0, seed),
        "shards": lambda: skews.shards(sizes, clients, 2, seed),
    }.get(kind, lambda: skews.even(num_classes, clients))()
    np.testing.assert_allclose(shares.sum(1), 1)
    parts = skews.cut(y, whole, shares, seed)
    for name in PARTS:
        total = np.bincount(y[getattr(whole, name)], minlength=num_classes)
        counts = np.stack([np.bincount(y[getattr(part, name)], minlength=num_classes) for part in parts], 1)
        wanted = shares * total[:, None]
        moved = np.maximum(skews.LEAST[name] - np.floor(wanted).sum(0), 0).sum()  # images that may have changed hands
        assert np.abs(counts - wanted).max() <= 1 + moved


@given(st.integers(2, 10), st.integers(1, 5), st.integers(0, 2**32))
def test_shards_give_each_client_few_classes_and_equal_sizes(clients: int, per_client: int, seed: int) -> None:
    sizes = np.full(10, 100)
    shares = skews.shards(sizes, clients, per_client, seed)
    np.testing.assert_allclose((shares * sizes[:, None]).sum(0), 1000 / clients)
    # a shard of s images touches at most ceil(s / 100) + 1 classes
    assert ((shares > 1e-12).sum(0) <= per_client * (np.ceil(1000 / (clients * per_client) / 100) + 1)).all()


def test_a_small_alpha_concentrates_classes_and_a_large_one_spreads_them() -> None:
    held = {alpha: (skews.dirichlet(10, 20, alpha, 0) > 0.02).sum(0).mean() for alpha in (0.05, 0.5, 100.0)}
    assert held[0.05] < held[0.5] < held[100.0] == 10


def test_lognormal_sizes_have_their_spread() -> None:
    logs = np.log(skews.quantity(1, 4000, 1.5, 0)[0])
    assert abs(logs.std() - 1.5) < 5 * 1.5 / (2 * 4000) ** 0.5  # five standard errors of a normal's standard deviation


@given(cases())
def test_writers_are_never_divided(case: tuple[data.Dataset, data.Plan, int, int]) -> None:
    dataset, _, clients, seed = case
    assert dataset.writer is not None
    parts = data.parts(dataset, data.Plan(partition="writers"), clients, seed)
    writers = [set(dataset.writer[rows([part])]) for part in parts]
    assert sum(map(len, writers)) == len(set().union(*writers)) == len(np.unique(dataset.writer))
    assert max(map(len, writers)) - min(map(len, writers)) <= 1


@given(st.lists(st.integers(20, 60), min_size=1, max_size=4), st.integers(0, 2**32))
@example([20], 0)
def test_an_official_test_set_is_the_test_part(sizes: list[int], seed: int) -> None:
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    official = np.arange(0, len(y), 5)
    whole = data.split(y, seed, (0.6, 0.2, 0.2), official)
    assert np.array_equal(whole.test, official)
    assert np.array_equal(np.sort(np.concatenate([whole.train, whole.val, whole.test])), np.arange(len(y)))
    for label, _ in enumerate(sizes):
        left = np.sum(np.delete(y, official) == label)
        assert abs(np.sum(y[whole.train] == label) - 0.75 * left) <= 0.5


def test_feature_skew_adds_more_noise_to_later_clients_and_the_same_every_time(digits: data.Dataset) -> None:
    noisy = data.Plan(partition="features", noise=0.4)
    clients = data.clients_data(digits, noisy, 4, 0)
    clean = data.clients_data(digits, data.Plan(partition="iid"), 4, 0)
    for number, (one, without) in enumerate(zip(clients, clean, strict=True)):
        for name in PARTS:
            noise = getattr(one, name).x - getattr(without, name).x
            sd = 0.1 * (number + 1)
            assert abs(noise.std() - sd) < 5 * sd / (2 * noise.numel()) ** 0.5
    again = data.clients_data(digits, noisy, 4, 0)
    assert all((a.train.x == b.train.x).all() for a, b in zip(clients, again, strict=True))


def test_samples_limit_the_training_part_alone(digits: data.Dataset) -> None:
    plan = data.Plan(partition="classes", classes_per_client=4)
    for all_of_it, limited in zip(
        data.parts(digits, plan, 5, 0),
        data.parts(digits, data.Plan(classes_per_client=4, samples=50), 5, 0),
        strict=True,
    ):
        assert len(limited.train) == 50
        assert set(limited.train) <= set(all_of_it.train)
        assert np.array_equal(limited.test, all_of_it.test)


def test_shrinking_takes_the_mean_of_blocks() -> None:
    x = np.arange(32, dtype=np.uint8).reshape(1, 2, 4, 4)
    small = data.arrays.images(x, 2)
    assert small.shape == (1, 2, 2, 2)
    np.testing.assert_allclose(small[0, 0, 0, 0], (0 + 1 + 4 + 5) / 4 / 255, rtol=1e-6)
    with pytest.raises(DataError, match="shrink must divide the images' 4 x 4, got 3"):
        data.arrays.images(x, 3)


@pytest.mark.parametrize(
    ("plan", "clients", "sentence"),
    [
        (data.Plan(partition="writers"), 3, "writers needs a data set that says who wrote each image"),
        (data.Plan(partition="writers", writers_per_client=2), 3, "writers needs a data set that says who wrote"),
        (data.Plan(partition="dirichlet", alpha=0), 3, "alpha must be positive and finite, got 0"),
        (data.Plan(partition="quantity", sigma=-1), 3, "sigma must be at least 0 and finite, got -1"),
        (data.Plan(partition="shards", shards_per_client=0), 3, "shards_per_client must be at least 1, got 0"),
        (data.Plan(partition="iid"), 600, "600 clients need 2 train images each, there are 1078"),
        (data.Plan(official_test=True), 3, "digits has no official test set, leave official_test out"),
    ],
)
def test_what_cannot_be_cut_is_one_sentence(digits: data.Dataset, plan: data.Plan, clients: int, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        data.parts(digits, plan, clients, 0)
    assert "\n" not in str(caught.value)
