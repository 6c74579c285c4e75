"""One sentence for every file that is not what it should be, and the model as it was."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import Tensors, factory, joined, packed, parts, rewritten, state
from safetensors.torch import save_file
from torch import Tensor, nn

import qupedkern as qk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    qk.save(packed(), file)
    return file


def refused(path: Path, content: bytes | None = None, make: Callable[[], nn.Module] = factory) -> str:
    """Load the file; it must be one FileError that names it, and the model unchanged to the bit. Returns the problem."""
    if content is not None:
        path.write_bytes(content)
    model = make()
    before, modules = state(model), list(model.modules())
    with pytest.raises(qk.FileError) as caught:
        qk.load_(model, path)
    text = str(caught.value)
    assert text.startswith(f"load: {path}: ")
    assert "\n" not in text
    assert len(text) < 600 + len(str(path))
    assert state(model) == before
    assert list(model.modules()) == modules
    with pytest.raises(qk.FileError):
        qk.load(make, path)
    return text.removeprefix(f"load: {path}: ")


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, -1])
def test_a_truncated_file_is_refused(path: Path, cut: int) -> None:
    assert "not a readable safetensors file" in refused(path, path.read_bytes()[:cut])


@pytest.mark.parametrize("extra", [b"\0", b"x" * 1000])
def test_bytes_after_the_end_are_refused(path: Path, extra: bytes) -> None:
    assert "not a readable safetensors file" in refused(path, path.read_bytes() + extra)


@pytest.mark.parametrize("size", [1, 8, 100, 5000])
def test_random_bytes_are_refused(path: Path, size: int) -> None:
    assert "not a readable safetensors file" in refused(path, random.Random(size).randbytes(size))


def test_another_architecture_is_refused(path: Path) -> None:
    def wider() -> nn.Module:
        model = factory()
        model[5] = nn.Linear(5, 4)
        return model

    def other_padding() -> nn.Module:
        model = factory()
        model[0] = nn.Conv2d(1, 4, 3, padding=1)
        return model

    def other_kind() -> nn.Module:
        model = factory()
        model[0] = nn.Linear(1, 4)
        return model

    def with_bias() -> nn.Module:
        model = factory()
        model[4] = nn.Linear(144, 5)
        return model

    def subclass() -> nn.Module:
        class Own(nn.Linear):
            pass

        model = factory()
        model[5] = Own(5, 3)
        return model

    def more() -> nn.Module:
        return factory().append(nn.BatchNorm1d(3))

    for make, sentence in (
        (wider, "layer '5' does not fit the model's: file torch.float32 (3, 5), with bias; model torch.float32 (4, 5)"),
        (other_padding, "layer '0' does not fit the model's: file {"),
        (other_kind, "layer '0' is of kind 'conv2d', the model has there: Linear"),
        (with_bias, "layer '4' does not fit the model's"),
        (subclass, "layer '5' is of kind 'linear', the model has there: Own"),
        (more, "its tensors do not fit the model (missing ['6.bias', '6.num_batches_tracked', '6.running_mean'"),
        (lambda: factory().double(), "file torch.float32 (4, 1, 3, 3), with bias; model torch.float64 (4, 1, 3, 3)"),
        (lambda: factory()[:4], "the model has no layer '4'"),
    ):
        assert sentence in refused(path, make=make), sentence


def put(name: str, value: Tensor | Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value(tensors[name]) if callable(value) else value})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("4.packed"), "layer '4' must have the tensors ['4.centers', '4.packed'], got ['4.centers']"),
        (lambda t: t.pop("5.bias"), "layer '5' must have the tensors ['5.bias', '5.centers', '5.packed']"),
        (lambda t: t.pop("1.running_var"), "missing ['1.running_var'], unexpected none"),
        (put("4.bias", torch.zeros(5)), "layer '4' must have the tensors"),
        (put("4.extra.deep", torch.zeros(5)), "unexpected ['4.extra.deep']"),
        (put("7.weight", torch.zeros(5)), "unexpected ['7.weight']"),
        (put("1.weight", torch.zeros(5)), "1.weight must be torch.float32 (4,), got torch.float32 (5,)"),
        (put("1.weight", lambda w: w.double()), "1.weight must be torch.float32 (4,), got torch.float64 (4,)"),
        (put("4.centers", lambda c: c.double()), "file torch.float64 (5, 144), without bias; model torch.float32"),
        (put("4.centers", lambda c: c.int()), "4.centers must be (3,) of one float type in the layer, got torch.int32"),
        (put("4.centers", lambda c: c[:2]), "4.centers must be (3,)"),
        (put("4.centers", lambda c: c[None]), "4.centers must be (3,)"),
        (put("4.centers", lambda c: c.flip(0)), "4.centers must be finite and ascending"),
        (put("4.centers", lambda c: c * float("nan")), "4.centers must be finite and ascending"),
        (put("4.centers", lambda c: c + torch.tensor([0, 0, float("inf")])), "4.centers must be finite and ascending"),
        (put("4.packed", lambda p: p[:-1]), "4.packed does not hold (5, 144) codes of 2 bits"),
        (put("4.packed", lambda p: torch.cat([p, p])), "4.packed does not hold (5, 144) codes of 2 bits"),
        (put("4.packed", lambda p: p.to(torch.int8)), "4.packed does not hold (5, 144) codes of 2 bits"),
        (put("4.packed", lambda p: p | 3), "4.packed has code 3, the layer has 3 levels"),
        (put("5.bias", lambda b: b.half()), "5.bias must be (3,) of one float type in the layer, got torch.float16"),
        (put("5.bias", torch.zeros(4)), "5.bias must be (3,)"),
    ],
)
def test_wrong_tensors_are_refused(path: Path, change: Callable[[Tensors], object], sentence: str) -> None:
    rewritten(path, change)
    assert sentence in refused(path)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"format": "gguf"}, "not a packed model of this library (format 'gguf', needed 'qupedkern')"),
        ({"format_version": "2"}, "written in format version '2', this version reads 1; update qupedkern"),
        ({"layers": "{}"}, "its metadata names no layers"),
        ({"layers": "[]"}, "its metadata names no layers"),
        ({"layers": "NaN"}, "its metadata cannot be read (ValueError: NaN is no JSON)"),
        ({"layers": '{"0": 1'}, "its metadata cannot be read (JSONDecodeError"),
        ({"layers": "[" * 100_000}, "its metadata cannot be read (ValueError: it is nested too deeply)"),
        ({"layers": '{"a":' * 100_000}, "its metadata cannot be read (ValueError: it is nested too deeply)"),
        ({"layers": "9" * 100_000}, "its metadata cannot be read (ValueError: a number of 100000 digits)"),
        ({"layers": '{"5": 1, "5": 2}'}, "its metadata cannot be read (ValueError: the name '5' comes twice)"),
        ({"layers": '{"a\\u001b[31m\\n": 1}'}, "names in its metadata must be printable"),
        ({"layers": '{"\\ud800": 1}'}, "names in its metadata must be printable"),
        ({"layers": '{"%s": 1}' % ("x" * 10_000)}, " ..."),
        ({"layers": '{"../../etc": {}}'}, "layer '../../etc' must be described by arguments, bias, bits, groups, kind"),
        ({"aliases": "[]"}, "its metadata names no layers"),
        ({"aliases": '{"a": 1}'}, "its metadata must map aliases to names"),
        ({"aliases": '{"a": "b"}'}, "alias 'a' of 'b' points nowhere"),
        ({"aliases": '{"a": "b", "b": "a"}'}, "points nowhere"),
        ({"aliases": '{"4.packed": "5.packed"}'}, "alias '4.packed' of '5.packed' points nowhere"),
        ({"aliases": '{"/etc/passwd": "5.packed"}'}, "unexpected ['/etc/passwd']"),
    ],
)
def test_wrong_metadata_is_refused(path: Path, metadata: dict[str, str], sentence: str) -> None:
    header, body = parts(path.read_bytes())
    header["__metadata__"].update(metadata)
    assert sentence in refused(path, joined(header, body))


HUGE = 2**40


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("kind", "lstm", "has kind 'lstm', this version knows linear, "),
        ("kind", ["linear"], "has kind ['linear'], this version knows linear, "),
        ("kind", "conv2d", "has arguments ['in_features', 'out_features'], a conv2d layer has ['dilation'"),
        ("levels", 1, "needs levels from 2 to 256, got 1"),
        ("levels", 4, "5.centers must be (4,)"),
        ("levels", 3.0, "needs levels from 2 to 256, got 3.0"),
        ("levels", True, "needs levels from 2 to 256, got True"),
        ("bits", 3, "has 3 levels, which take another number of bits than 3"),
        ("bits", -(10**18), "needs bits from 1 to 8"),
        ("groups", 0, "needs groups from 1 to"),
        ("groups", 7, "has 7 groups, which do not divide its shape (3, 5)"),
        ("groups", 3, "5.centers must be (3, 3)"),
        ("shape", "3x5", "needs a shape of two to 8 positive sizes, got '3x5'"),
        ("shape", [], "needs a shape of two to 8 positive sizes, got []"),
        ("shape", [3, 5.0], "needs a shape of two to 8 positive sizes, got [3, 5.0]"),
        ("shape", [3, -5], "needs a shape of two to 8 positive sizes, got [3, -5]"),
        ("shape", [[3], {}], "needs a shape of two to 8 positive sizes"),
        ("shape", [HUGE, HUGE], "has shape (1099511627776, 1099511627776), its arguments make (3, 5)"),
        ("shape", [3, 6], "has shape (3, 6), its arguments make (3, 5)"),
        ("shape", [3] + [HUGE] * 1000, "needs a shape of two to 8 positive sizes, got [3, 1099511627776,"),
        ("shape", [3, 2**62], "needs a shape of two to 8 positive sizes"),
        ("shape", [5, 3], "has shape (5, 3), its arguments make (3, 5)"),
        ("arguments", "in_features=5", "needs arguments as a table and bias as true or false"),
        ("arguments", {"in_features": 3, "out_features": 5}, "has shape (3, 5), its arguments make (5, 3)"),
        ("arguments", {"in_features": 5, "out_features": 3, "device": "cuda"}, "has arguments ['device',"),
        ("bias", 1, "needs arguments as a table and bias as true or false"),
        ("bias", False, "layer '5' must have the tensors ['5.centers', '5.packed'], got ['5.bias'"),
        ("colour", "red", "must be described by arguments, bias, bits, groups, kind, levels, shape"),
    ],
)
def test_a_wrong_description_of_a_layer_is_refused(path: Path, field: str, value: Any, sentence: str) -> None:
    header, body = parts(path.read_bytes())
    layers = json.loads(header["__metadata__"]["layers"])
    layers["5"][field] = value
    header["__metadata__"]["layers"] = json.dumps(layers)
    tracemalloc.start()
    try:
        assert sentence in refused(path, joined(header, body))
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_other_safetensors_files_and_no_files_are_refused(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)
    assert "not a packed model of this library (format None, needed 'qupedkern')" in refused(path)
    assert refused(path.parent) == "not a file"
    with pytest.raises(FileNotFoundError, match=r"^load: there is no file .*nothing$"):
        qk.load(factory, path.parent / "nothing")


def test_a_layer_without_a_name_is_refused_when_written_and_when_read(path: Path) -> None:
    with pytest.raises(ValueError, match=r"^save: the model is itself a packed layer; wrap it"):
        qk.save(packed()[5], path)
    header, body = parts(path.read_bytes())
    header["__metadata__"]["layers"] = header["__metadata__"]["layers"].replace('"5":', '"":')
    assert "it holds a layer without a name" in refused(path, joined(header, body), make=lambda: nn.Linear(5, 3))


def test_a_factory_that_is_none_is_refused_with_a_sentence(path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"^load: model_factory must be a function that builds the model, got Sequential$"
    ):
        qk.load(factory(), path)
    with pytest.raises(TypeError, match=r"^load_: model must be a torch.nn.Module, got NoneType$"):
        qk.load(lambda: None, path)
