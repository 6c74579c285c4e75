"""Splits and partitions of a data set: laws by property, and a sentence for what cannot be done."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl import data
from fl.errors import DataError
from fl.models import ARCHITECTURES, build


@st.composite
def federations(draw: st.DrawFn) -> tuple[np.ndarray, int, tuple[int, int], int]:
    """(labels, clients, [low, high] classes a client, seed), with enough images for every client to get some."""
    num_classes = draw(st.integers(2, 6))
    low = draw(st.integers(1, num_classes))
    high = draw(st.integers(low, num_classes))
    clients = draw(st.integers(-(-num_classes // low), 8))
    # 10 % of a class must reach all its holders, of whom there are at most `clients`
    sizes = draw(st.lists(st.integers(12 * clients, 16 * clients), min_size=num_classes, max_size=num_classes))
    seed = draw(st.integers(0, 2**32))
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(num_classes), sizes))
    return y, clients, (low, high), seed


@given(federations())
def test_split_is_disjoint_complete_and_stratified(case: tuple[np.ndarray, int, tuple[int, int], int]) -> None:
    y, _, _, seed = case
    whole = data.split(y, seed)
    parts = (whole.train, whole.val, whole.test)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(y)))
    for part, fraction in zip(parts, data.FRACTIONS, strict=True):
        for label in np.unique(y):
            count, total = np.sum(y[part] == label), np.sum(y == label)
            assert abs(count - fraction * total) <= 1  # two cuts, each rounded by at most one half


@given(federations())
def test_partition_gives_every_sample_to_one_client(case: tuple[np.ndarray, int, tuple[int, int], int]) -> None:
    y, clients, bounds, seed = case
    whole = data.split(y, seed)
    parts = data.partition(y, whole, clients, bounds, seed)
    assert len(parts) == clients
    for name in ("train", "val", "test"):
        given_out = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(np.sort(given_out), getattr(whole, name))


@given(federations())
def test_partition_follows_one_class_set_a_client(case: tuple[np.ndarray, int, tuple[int, int], int]) -> None:
    y, clients, bounds, seed = case
    parts = data.partition(y, data.split(y, seed), clients, bounds, seed)
    held = [set(y[part.train]) for part in parts]
    assert set().union(*held) == set(y)
    for part, classes in zip(parts, held, strict=True):
        assert bounds[0] <= len(classes) <= bounds[1]
        assert set(y[part.val]) == set(y[part.test]) == classes
    holders = [sum(label in classes for classes in held) for label in np.unique(y)]
    assert max(holders) - min(holders) <= 1  # the classes are spread as evenly as can be


@settings(max_examples=10)
@given(federations())
def test_split_and_partition_repeat_with_their_seed(case: tuple[np.ndarray, int, tuple[int, int], int]) -> None:
    y, clients, bounds, seed = case

    def all_indices(number: int) -> list[bytes]:
        parts = data.partition(y, data.split(y, number), clients, bounds, number)
        return [getattr(part, name).tobytes() for part in parts for name in ("train", "val", "test")]

    assert all_indices(seed) == all_indices(seed)
    assert all_indices(seed) != all_indices(seed + 1)


def test_digits_are_real_and_split_60_10_30(digits: data.Dataset) -> None:
    whole = data.split(digits.y, 0)
    assert digits.x.shape == (1797, 1, 8, 8)
    assert (digits.x.min(), digits.x.max()) == (0, 1)
    assert [len(whole.train), len(whole.val), len(whole.test)] == [1078, 180, 539]


@pytest.mark.parametrize(
    ("clients", "classes", "sentence"),
    [
        (10, 11, "classes_per_client must be between 1 and the data's 10 classes"),
        (10, 0, "classes_per_client must be between 1"),
        (10, [4, 3], "classes_per_client must be between 1"),
        (2, 3, "2 clients with 3 classes each cannot hold all 10 classes"),
        (60, 10, "samples for its 60 clients, use fewer clients"),
    ],
)
def test_a_class_count_that_cannot_be_split_is_one_sentence(
    digits: data.Dataset, clients: int, classes: int | list[int], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        data.partition(digits.y, data.split(digits.y, 0), clients, classes, seed=0)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.5, 0.2, 0.2)])
def test_fractions_must_be_three_shares(digits: data.Dataset, fractions: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="fractions must be three positive numbers with sum 1"):
        data.split(digits.y, 0, fractions)


def test_npz_files_load_from_the_data_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.random.default_rng(0).random((12, 5, 6)), np.arange(12) % 3
    np.savez(tmp_path / "set.npz", x=x, y=y)
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path))
    dataset = data.load("set.npz", data.data_directory(None))
    assert dataset.input_shape == (1, 5, 6)
    assert dataset.num_classes == 3
    assert np.array_equal(dataset.x[:, 0], x.astype(np.float32))
    monkeypatch.setenv(data.DATA_VARIABLE, "")
    assert data.data_directory(None) is None
    assert data.data_directory(tmp_path) == tmp_path


def test_data_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "half.npz", x=np.zeros((3, 4, 4)))
    np.savez(tmp_path / "ragged.npz", x=np.zeros((3, 4, 4)), y=np.zeros(2, dtype=int))
    np.savez(tmp_path / "float_labels.npz", x=np.zeros((3, 4, 4)), y=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}, {}]), y=np.zeros(2, dtype=int))
    for name, sentence in [
        ("missing.npz", "there is no file"),
        ("text.npz", "not in that format"),
        ("half.npz", "arrays 'x' and 'y'"),
        ("ragged.npz", "y of shape"),
        ("float_labels.npz", "labels 0, 1"),
        ("pickled.npz", "plain arrays"),
        (
            "mnlst",
            "must be one of digits, mnist, fashion-mnist, cifar10, femnist, or a file ending in .npz, got 'mnlst'",
        ),
    ]:
        with pytest.raises(DataError, match=sentence):
            data.load(name, tmp_path)
    with pytest.raises(DataError, match="needs a data directory"):
        data.load("set.npz", None)
    with pytest.raises(DataError, match="data directory must exist"):
        data.data_directory(tmp_path / "nowhere")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_models_are_fixed_by_their_seed_and_leave_the_global_generator_alone(name: str) -> None:
    import torch

    before = torch.get_rng_state()
    one, same, other = (build(name, (1, 8, 8), 10, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_resnets_have_the_parameters_of_their_depth_and_quantize_all_but_their_ends() -> None:
    import qupedkern as qk

    for name, parameters, layers in [("resnet8", 78042, 8), ("resnet20", 272474, 20), ("resnet32", 466906, 32)]:
        model = build(name, (3, 32, 32), 10, seed=0)
        assert sum(p.numel() for p in model.parameters()) == parameters
        qk.quantize_(model, bits=2)
        assert len(qk.nn.quantized_layers(model)) == layers


def test_cnn1_and_cnn2_have_their_parameters() -> None:
    for name, parameters in [("cnn1", 9930), ("cnn2", 25066)]:
        assert sum(p.numel() for p in build(name, (1, 14, 14), 10, seed=0).parameters()) == parameters


def test_a_resnet_that_is_too_small_for_its_strides_is_refused() -> None:
    with pytest.raises(ValueError, match="images must be at least 4 x 4, got 3 x 8"):
        build("resnet20", (1, 3, 8), 10, 0)


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="must be one of cnn, cnn1, cnn2, mlp, resnet20, resnet32, resnet8, got 'vgg'"):
        build("vgg", (1, 8, 8), 10, 0)
