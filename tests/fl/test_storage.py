"""State on disk: exact round trips, and files that are whole or as they were."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fl import ClientState, storage
from fl.errors import CheckpointError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    seed = draw(st.integers(0, 1000))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100
    return values.abs().to(draw(st.sampled_from(DTYPES)))


def trees() -> st.SearchStrategy[Any]:
    """What state dicts are made of."""
    leaves = st.one_of(
        tensors(), st.none(), st.booleans(), st.integers(), st.text(), st.floats(allow_nan=False, allow_infinity=True)
    )
    keys = st.one_of(st.integers(0, 5), st.sampled_from(["state", "param_groups", "tensor", "items"]))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=8,
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(tree=trees())
def test_a_tree_survives_flattening_and_the_file(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("tree") / "state.safetensors"
    flat, rest = storage.flatten(tree, "tree")
    ClientState(flat, rest).save(path)
    loaded = ClientState.load(path)
    assert same(storage.unflatten(loaded.tensors, loaded.scalars), tree)


@pytest.mark.parametrize(
    "tree", [{"a": object()}, {"a": {1, 2}}, {1.5: 0}, {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}]
)
def test_what_is_not_plain_data_is_refused(tree: Any) -> None:
    with pytest.raises(TypeError, match="flatten: "):
        storage.flatten(tree)


def test_equal_state_gives_equal_bytes(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    one = ClientState({"a": x, "b": x[:, 1]}, {"first": 1, "second": math.pi})
    two = ClientState({"b": x[:, 1].clone(), "a": x.clone()}, {"second": math.pi, "first": 1})
    one.save(tmp_path / "one")
    two.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_shared_or_strided_tensor_is_stored_by_value(tmp_path: Path) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    ClientState({"whole": x, "transposed": x.T, "again": x}, None).save(tmp_path / "state")
    loaded = ClientState.load(tmp_path / "state").tensors
    assert all(torch.equal(loaded[name], value) for name, value in [("whole", x), ("transposed", x.T), ("again", x)])


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = tmp_path / "state"
    storage.save_state(path, {"a": torch.ones(2)}, 1)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        storage.save_state(path, {"a": torch.zeros(2)}, 2)
    if failing == "replace":
        with pytest.raises(OSError, match="no space left"):
            ClientState({"a": torch.zeros(2)}, 2).save(path)
    else:
        with pytest.raises(OSError, match="no space left"):
            storage.make_durable([path])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_state_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "state"
    ClientState({"a": torch.ones(20)}, 1).save(path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-1], whole[:20]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="must be a state file"):
            ClientState.load(path)
    with pytest.raises(CheckpointError, match="must be a state file"):
        ClientState.load(tmp_path / "absent")
