"""Pure parts of a federation: sampling, batches, aggregation, seeds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl import core, seeds
from fl.core import Message


@st.composite
def messages(draw: st.DrawFn) -> dict[int, Message]:
    """Messages of different clients, in a random order of arrival, with values of very different size."""
    ids = draw(st.lists(st.integers(0, 50), min_size=1, max_size=6, unique=True))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    scale = draw(st.sampled_from([1e-20, 1.0, 1e20]))
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    return {
        number: Message(
            {"w": scale * torch.randn(shape, generator=random), "steps": torch.randint(9, (), generator=random)},
            draw(st.integers(1, 200)),
        )
        for number in ids
    }


@given(messages(), st.booleans(), st.randoms(use_true_random=False))
def test_aggregation_does_not_depend_on_the_order_of_arrival(
    arrived: dict[int, Message], weighted: bool, random: "st.random.Random"
) -> None:
    order = list(arrived)
    random.shuffle(order)
    one = core.aggregate(arrived, weighted)
    two = core.aggregate({number: arrived[number] for number in order}, weighted)
    assert all(torch.equal(one[name], two[name]) for name in one)


@given(messages(), st.booleans())
def test_aggregation_of_equal_messages_is_exact(arrived: dict[int, Message], weighted: bool) -> None:
    first = next(iter(arrived.values())).tensors
    mean = core.aggregate({number: Message(first, message.samples) for number, message in arrived.items()}, weighted)
    assert all(torch.equal(mean[name], first[name]) for name in first)
    assert all(mean[name].dtype == first[name].dtype for name in first)


def test_the_mean_is_plain_or_by_samples() -> None:
    arrived = {5: Message({"w": torch.tensor([1.0])}, 30), 2: Message({"w": torch.tensor([4.0])}, 60)}
    assert core.aggregate(arrived)["w"].item() == 2.5
    assert core.aggregate(arrived, weighted=True)["w"].item() == 3.0
    with pytest.raises(ValueError, match="at least one message"):
        core.aggregate({})


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 5), st.integers(0, 2**60))
def test_sampling_draws_distinct_clients_by_seed_and_round(count: int, share: float, turn: int, seed: int) -> None:
    drawn = core.sample_clients(seed, turn, count, share)
    assert drawn == core.sample_clients(seed, turn, count, share) == sorted(set(drawn))
    assert len(drawn) == max(1, round(share * count))
    assert all(0 <= number < count for number in drawn)


def test_every_client_is_drawn_about_as_often() -> None:
    counts = torch.zeros(10)
    for turn in range(500):
        counts[core.sample_clients(7, turn, 10, 0.3)] += 1
    assert (counts - 150).abs().max() < 5 * (500 * 0.3 * 0.7) ** 0.5  # five standard deviations of a binomial


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 25), st.integers(0, 100))
def test_batches_are_full_and_pass_through_the_data(samples: int, size: int, steps: int, seed: int) -> None:
    chosen = list(core.batches(samples, size, steps, torch.Generator().manual_seed(seed)))
    full = min(samples, size)
    assert [len(index) for index in chosen] == [full] * steps
    per_pass = samples // full
    for start in range(0, steps, per_pass):
        seen = torch.cat(chosen[start : start + per_pass])
        assert len(seen.unique()) == len(seen)  # no image twice within a pass
        assert seen.max() < samples


def test_seeds_differ_by_purpose_and_number_and_are_fixed() -> None:
    names = [seeds.derive_seed(s, p, *n) for s in (0, 1) for p in ("a", "b") for n in ((), (1,), (1, 2), (12,))]
    assert len(set(names)) == len(names)
    assert all(0 <= seed < 2**63 for seed in names)
    assert seeds.derive_seed(0, "sample", 3) == 2473139207761617941  # a changed derivation changes every published run


def test_payload_counts_every_byte() -> None:
    assert core.payload_bytes({"w": torch.zeros(3, 4), "n": torch.zeros((), dtype=torch.int64)}) == 56
