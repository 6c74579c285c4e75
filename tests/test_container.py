"""The safetensors container: what we write the safetensors package reads, and the reverse, in every type and shape."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qupedkern.files import FileError
from qupedkern.files.container import CHUNK, container_types, opened, write

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype, shape = draw(st.sampled_from(container_types())), draw(shapes)
    size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    content = torch.frombuffer(bytearray(draw(st.binary(min_size=size, max_size=size)) + b"\0"), dtype=torch.uint8)
    content = content[:-1] & 1 if dtype == torch.bool else content[:-1]
    return content.clone().view(dtype).reshape(shape)


def content_of(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read(path: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    with opened(path) as file:
        return {name: content_of(file.read(name)) for name in file.stored}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, tensors(), max_size=5), st.dictionaries(names, st.text(st.characters(codec="utf-8"))))
def test_each_reads_what_the_other_writes(tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    expected = {name: content_of(tensor) for name, tensor in tensors.items()}
    path = tmp_path / "file"
    write(str(path), tensors, metadata)
    assert {name: content_of(t) for name, t in safetensors.torch.load_file(path).items()} == expected
    with safetensors.safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == metadata
    assert read(path) == expected
    first = path.read_bytes()
    safetensors.torch.save_file(tensors, path, metadata or None)
    assert read(path) == expected
    write(str(path), dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert path.read_bytes() == first


def test_every_tensor_lies_at_a_multiple_of_its_own_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    every = {f"{i}": torch.zeros(i + 1).to(dtype) for i, dtype in enumerate(container_types())}
    write(str(path), every, {})
    with opened(path) as file:
        assert all(stored.begin % stored.dtype.itemsize == 0 for stored in file.stored.values())


def test_views_and_strides_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    views = {"t": whole.T, "part": whole[1:3, ::2], "one": whole[0, :1].expand(5), "nothing": whole[:0]}
    write(str(tmp_path / "file"), views, {})
    assert read(tmp_path / "file") == {name: content_of(view) for name, view in views.items()}


@pytest.mark.parametrize("unit", [1, 3, 7, 256])
def test_pieces_make_up_the_tensor(tmp_path: Path, unit: int) -> None:
    value = torch.randint(0, 256, (2 * CHUNK + 12345,), dtype=torch.uint8)
    write(str(tmp_path / "file"), {"a": value, "b": value[:4].float()}, {})
    with opened(tmp_path / "file") as file:
        pieces = list(file.chunks("a", unit))
        assert all(len(piece) <= CHUNK and len(piece) % unit == 0 for piece in pieces[:-1])
        assert torch.equal(torch.cat(pieces), value)
        assert [piece.tolist() for piece in file.chunks("b", unit)] == [value[:4].tolist()]


def file_of(text: str | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def entry(dtype: object = "U8", shape: object = (2,), offsets: object = (0, 2)) -> str:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it has no header"),
        (b"1234567", "it has no header"),
        (struct.pack("<Q", 0), "it has no header"),
        (file_of("{}", length=3), "its header would have 3 bytes, the file has 10"),
        (file_of("{}", length=2**64 - 1), "its header would have 18,446,744,073,709,551,615 bytes, the file has 10"),
        (file_of(b"\xff\xfe{}"), "its header is no valid JSON: it does not begin with {"),
        (file_of(b'{"\xff": 1}'), "its header is no valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (file_of("[]"), "its header is no valid JSON: it does not begin with {"),
        (file_of(" {}"), "its header is no valid JSON: it does not begin with {"),
        (file_of("{} x"), "its header is no valid JSON: Extra data"),
        (file_of('{"a": NaN}'), "its header is no valid JSON: NaN is no JSON"),
        (file_of('{"a":' * 50_000), "its header is no valid JSON: it is nested too deeply"),
        (file_of('{"a": 1, "a": 2}'), "its header is no valid JSON: the name 'a' comes twice"),
        (file_of('{"a": %s}' % ("9" * 5000)), "its header is no valid JSON: a number of 5000 digits"),
        (file_of('{"__metadata__": []}'), "its metadata must map names to strings"),
        (file_of('{"__metadata__": {"a": 1}}'), "its metadata must map names to strings"),
        (file_of('{"a": 1}'), "tensor 'a' must be described by dtype, shape and data_offsets"),
        (
            file_of('{"a": {"dtype": "U8", "shape": []}}'),
            "tensor 'a' must be described by dtype, shape and data_offsets",
        ),
        (file_of(entry("U9"), b"ab"), "tensor 'a' has type 'U9', known are F64"),
        (file_of(entry(["U8"]), b"ab"), "tensor 'a' has type ['U8'], known are F64"),
        (file_of(entry(shape=2), b"ab"), "tensor 'a' needs shape of at most 16 sizes, got 2"),
        (file_of(entry(shape=[-2]), b"ab"), "tensor 'a' needs shape of at most 16 sizes, got [-2]"),
        (file_of(entry(shape=[2.0]), b"ab"), "tensor 'a' needs shape of at most 16 sizes, got [2.0]"),
        (file_of(entry(shape=[True, 2]), b"ab"), "tensor 'a' needs shape of at most 16 sizes"),
        (file_of(entry(shape=[2**63]), b"ab"), "tensor 'a' needs shape of at most 16 sizes"),
        (file_of(entry(shape=[1] * 17), b"ab"), "tensor 'a' needs shape of at most 16 sizes"),
        (file_of(entry(shape=[2**62] * 16), b"ab"), "tensor 'a' does not lie where it should"),
        (file_of(entry(offsets=[0]), b"ab"), "tensor 'a' needs two data_offsets, got [0]"),
        (file_of(entry(offsets=[0, 2, 2]), b"ab"), "tensor 'a' needs data_offsets of at most 2 sizes"),
        (file_of(entry(offsets=[2, 0]), b"ab"), "tensor 'a' does not lie where it should"),
        (file_of(entry(offsets=[1, 3]), b"abc"), "tensor 'a' does not lie where it should"),
        (file_of(entry(shape=[3]), b"ab"), "tensor 'a' does not lie where it should"),
        (file_of(entry(), b"a"), "its tensors end at byte"),
        (file_of(entry(), b"abc"), "its tensors end at byte"),
    ],
)
def test_what_is_no_container_is_refused_with_a_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(FileError) as caught, opened(path):
        pass
    assert str(caught.value).startswith(f"load: {path}: not a readable safetensors file ({sentence}")


def test_a_header_longer_than_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(file_of("{", length=2**30))
        file.truncate(2**31)  # sparse: it takes no room
    with (
        pytest.raises(FileError, match=r"its header would have 1,073,741,824 bytes, the largest is 16,777,216\)$"),
        opened(path),
    ):
        pass


def test_a_bool_is_true_or_false(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(file_of(entry("BOOL"), b"\1\2"))
    with (
        pytest.raises(FileError, match=r"a is of type bool and has a value that is neither true nor false$"),
        opened(path) as file,
    ):
        file.read("a")


def test_a_file_that_is_cut_while_it_is_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    size = 2**20
    path.write_bytes(file_of(entry(shape=[size], offsets=[0, size]), bytes(size)))

    def read_what_is_cut() -> None:
        with opened(path) as file:
            path.write_bytes(path.read_bytes()[:-1])
            file.read("a")

    with pytest.raises(FileError, match=r"it became shorter while it was read\)$"):
        read_what_is_cut()
