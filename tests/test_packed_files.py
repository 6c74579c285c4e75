"""Packed files: exact round trips, and one sentence for every file that is not what it should be."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import qupedkern as qk
from qupedkern.nn import packed_layers
from qupedkern.packed import read_header, read_tensors, write_atomically


def factory() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 5, bias=False),
        nn.Linear(5, 3),
    ).eval()


def packed(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = factory()
    qk.quantize_(model, rule=lambda *_: True, **{"levels": 3, **options})
    return qk.pack_(model)


X = torch.linspace(-1, 1, 72).reshape(2, 1, 6, 6)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    qk.save(packed(), file)
    return file


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: repr((t.dtype, t.shape, t.tolist())).encode() for name, t in model.state_dict().items()}


# -- round trips --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([2, 3, 4, 5, 16, 256]),
    st.sampled_from(["tensor", "channel"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(0, 1000),
)
def test_loading_gives_the_saved_model_to_the_bit(
    tmp_path: Path, levels: int, groups: str, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    model = factory().to(dtype)
    qk.quantize_(model, levels=levels, groups=groups, rule=lambda *_: True)
    x = X.to(dtype)
    with qk.mode(model, "hard"):
        expected = model(x)
    qk.save(qk.pack_(model), tmp_path / "m.safetensors")
    loaded = qk.load(lambda: factory().to(dtype), tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), expected)
    assert state(loaded) == state(model)
    qk.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


@pytest.mark.parametrize("into", ["float", "quantized", "packed"])
def test_load_fills_a_model_in_place_whatever_its_present_form(path: Path, into: str) -> None:
    torch.manual_seed(9)
    model = factory()
    if into != "float":
        qk.quantize_(model, bits=4, rule=lambda *_: True)
    if into == "packed":
        qk.pack_(model)
    norm = model[1]
    assert qk.load_(model, path) is model
    assert model[1] is norm
    assert torch.equal(model(X), packed()(X))
    assert not model.training


def test_a_file_is_what_summary_says_and_a_header(path: Path) -> None:
    model = packed()
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size == 8 + header_bytes + qk.summary(model).total_bytes
    header = read_header(path)
    assert list(header.layers) == list(packed_layers(model))
    for name, layer in packed_layers(model).items():
        record = header.layers[name]
        assert (record.levels, record.bits, record.groups, record.shape) == (3, 2, 1, layer.weight_shape)


class Tied(nn.Module):
    """A weight used by two layers, a module used twice, a buffer that is a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.again = self.c
        whole = torch.arange(6.0)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[2:])

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.c(self.b(self.a(x).relu()).relu()).relu()) + self.part


def test_shared_weights_modules_and_storage_round_trip_and_are_stored_once(tmp_path: Path) -> None:
    model = Tied()
    qk.quantize_(model, bits=1, rule=lambda *_: True)
    qk.save(qk.pack_(model), tmp_path / "tied")
    loaded = qk.load(Tied, tmp_path / "tied")
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), model(x))
    assert loaded.a.centers is loaded.b.centers
    assert loaded.a.packed is loaded.b.packed
    assert loaded.c is loaded.again
    (header_bytes,) = struct.unpack("<Q", (tmp_path / "tied").read_bytes()[:8])
    assert (tmp_path / "tied").stat().st_size == 8 + header_bytes + qk.summary(model).total_bytes


@pytest.mark.parametrize("groups", ["tensor", "channel"])
def test_centers_that_have_crossed_are_written_in_order_and_mean_the_same(path: Path, groups: str) -> None:
    # a few steps of any optimizer on a packed model's centers can do it; the file was then refused
    model = packed(groups=groups, levels=5)
    with torch.no_grad():
        for layer in packed_layers(model).values():
            layer.centers.copy_(layer.centers.roll(2, dims=-1))
    before, expected = state(model), model(X)
    qk.save(model, path)
    assert state(model) == before
    loaded = qk.load(factory, path)
    assert torch.equal(loaded(X), expected)
    for layer in packed_layers(loaded).values():
        assert bool((layer.centers.diff(dim=-1) >= 0).all())


def test_loading_keeps_what_is_trainable_and_refuses_a_model_without_storage(path: Path) -> None:
    model = factory()
    model[0].requires_grad_(False)
    model[5].bias.requires_grad_(False)
    qk.load_(model, path)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "1.weight",
        "1.bias",
        "4.centers",
        "5.centers",
    }
    with pytest.raises(ValueError, match=r"^load_: the model must hold its tensors, got 0.weight on the meta device"):
        qk.load_(factory().to("meta"), path)


@pytest.mark.parametrize("moment", ["write", "replace"])
def test_a_failing_write_leaves_the_old_file_and_no_rest(
    path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("the disk is full")

    if moment == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        qk.save(packed(seed=1), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_write_cut_short_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()

    def write(temporary: str) -> None:
        Path(temporary).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_save_refuses_what_it_cannot_write_with_a_sentence(tmp_path: Path) -> None:
    quantized = factory()
    qk.quantize_(quantized)

    class Extra(nn.Linear):
        def get_extra_state(self) -> str:
            return "text"

    extra = nn.Sequential(Extra(3, 3), packed())
    broken = packed()
    with torch.no_grad():
        broken[4].centers[0] = float("nan")
    cases: list[tuple[Any, Path, type[Exception], str]] = [
        (factory(), tmp_path / "m", ValueError, "the model has no packed layers; call pack_ on it first"),
        (quantized, tmp_path / "m", ValueError, "the model has layers that are not packed (4)"),
        (extra, tmp_path / "m", ValueError, "the state of the model must be tensors, got str for 0._extra_state"),
        (broken, tmp_path / "m", ValueError, "the centers of 4 must be finite, got a NaN or an infinity"),
        ({}, tmp_path / "m", TypeError, "model must be a torch.nn.Module, got dict"),
        (packed(), tmp_path, OSError, f"{tmp_path} is a folder"),
        (packed(), tmp_path / "no" / "m", OSError, f"{tmp_path / 'no' / 'm'} is in a folder that does not exist"),
    ]
    for model, where, kind, sentence in cases:
        with pytest.raises(kind, match=r"^save: ") as caught:
            qk.save(model, where)
        assert sentence in str(caught.value)
    assert not list(tmp_path.iterdir())


# -- files that are not what they should be -------------------------------------------------------------------------------


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def joined(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


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
        (other_kind, "layer '0' is a conv2d layer, the model has a Linear there"),
        (with_bias, "layer '4' does not fit the model's"),
        (subclass, "layer '5' is a linear layer, the model has a Own there"),
        (more, "its tensors do not fit the model (missing ['6.bias', '6.num_batches_tracked', '6.running_mean'"),
        (lambda: factory().double(), "file torch.float32 (4, 1, 3, 3), with bias; model torch.float64 (4, 1, 3, 3)"),
        (lambda: factory()[:4], "the model has no layer '4'"),
    ):
        assert sentence in refused(path, make=make), sentence


Tensors = dict[str, Tensor]


def rewritten(path: Path, change: Callable[[Tensors], object], **metadata: str) -> None:
    """The same file with its tensors changed and other metadata."""
    header, tensors = read_header(path), read_tensors(path, read_header(path))
    change(tensors)
    old = parts(path.read_bytes())[0]["__metadata__"]
    assert header.version == 1
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {**old, **metadata})


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
        ({"layers": "NaN"}, "its metadata names no layers"),
        ({"layers": '{"0": 1'}, "its metadata cannot be read (JSONDecodeError"),
        ({"layers": "[" * 100_000}, "its metadata cannot be read (RecursionError"),
        ({"layers": '{"a":' * 100_000}, "its metadata cannot be read (RecursionError"),
        ({"layers": "9" * 100_000}, "its metadata cannot be read (ValueError"),
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
        ("kind", "lstm", "has kind 'lstm', this version knows linear, conv2d"),
        ("kind", ["linear"], "has kind ['linear'], this version knows linear, conv2d"),
        ("kind", "conv2d", "layer '5' is a conv2d layer, the model has a Linear there"),
        ("levels", 1, "needs levels from 2 to 256, got 1"),
        ("levels", 4, "5.centers must be (4,)"),
        ("levels", 3.0, "needs levels from 2 to 256, got 3.0"),
        ("levels", True, "needs levels from 2 to 256, got True"),
        ("bits", 3, "has 3 levels, which take another number of bits than 3"),
        ("bits", -(10**18), "needs bits from 1 to 8"),
        ("groups", 0, "needs groups from 1 to"),
        ("groups", 7, "has 7 groups, which do not divide its shape (3, 5)"),
        ("groups", 3, "5.centers must be (3, 3)"),
        ("shape", "3x5", "needs a shape of two or more positive sizes, got '3x5'"),
        ("shape", [], "needs a shape of two or more positive sizes, got []"),
        ("shape", [3, 5.0], "needs a shape of two or more positive sizes, got [3, 5.0]"),
        ("shape", [3, -5], "needs a shape of two or more positive sizes, got [3, -5]"),
        ("shape", [[3], {}], "needs a shape of two or more positive sizes"),
        ("shape", [HUGE, HUGE], "5.bias must be (1099511627776,)"),
        ("shape", [3, HUGE], "5.packed does not hold (3, 1099511627776) codes of 2 bits"),
        ("shape", [3] + [HUGE] * 1000, "5.packed does not hold"),
        ("shape", [3, 2**62], "needs a shape of two or more positive sizes"),
        ("shape", [5, 3], "5.bias must be (5,)"),
        ("arguments", "in_features=5", "needs arguments as a table and bias as true or false"),
        ("arguments", {"in_features": 3, "out_features": 5}, "does not fit the model's: file {'in_features': 3"),
        ("arguments", {"in_features": 5, "out_features": 3, "device": "cuda"}, "does not fit the model's"),
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


def mutated(file: bytes, rng: random.Random) -> bytes:
    """One to three random edits: flipped or replaced bytes, cuts, repeats, or a changed number or word of the header."""
    content = bytearray(file)
    (size,) = struct.unpack("<Q", file[:8])
    for _ in range(rng.randint(1, 3)):
        where = rng.randrange(len(content))
        choice = rng.randrange(6)
        if choice == 0:
            content[where] ^= 1 << rng.randrange(8)
        elif choice == 1:
            del content[where : where + rng.choice([1, 8, 10**6])]
        elif choice == 2:
            content[where:where] = rng.randbytes(rng.choice([1, 8, 64]))
        elif choice == 3:  # in the header, where a byte says most
            content[min(8 + rng.randrange(size), len(content) - 1)] = rng.choice(b'0129-"[]{}:,.eE\\ \x00\xff')
        elif choice == 4:
            content[:8] = struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1]))
        else:  # in the tensors, so that the header stays readable
            content[max(rng.randrange(8 + size, len(file)) - len(file) + len(content), 0)] = rng.randrange(256)
        if len(content) < 9:
            break
    return bytes(content)


def test_whatever_happened_to_a_file_loading_refuses_it_or_gives_valid_layers(path: Path) -> None:
    original, rng, outcomes = path.read_bytes(), random.Random(0), {"refused": 0, "loaded": 0}
    for _ in range(600):
        path.write_bytes(mutated(original, rng))
        model = factory()
        before = state(model)
        try:
            qk.load_(model, path)
            problem = None
        except qk.FileError as error:
            problem = str(error)
        outcomes["refused" if problem else "loaded"] += 1
        if problem:
            assert "\n" not in problem
            assert state(model) == before
            continue
        for layer in packed_layers(model).values():
            assert bool(layer.centers.isfinite().all())
            assert bool((layer.centers.diff(dim=-1) >= 0).all())
            assert int(layer.codes().max()) < layer.levels
        assert model(X).shape == (2, 3)
    assert min(outcomes.values()) > 5, outcomes  # both ways are tried


# -- the command line -----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "qupedkern", *arguments], capture_output=True, text=True, check=False)


def test_inspect_prints_true_sizes(path: Path) -> None:
    done = run("inspect", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    summary = qk.summary(packed())
    assert f"file {path.stat().st_size:,} bytes, tensors {summary.total_bytes:,}" in done.stdout
    assert f"weights {sum(row.weight_bytes for row in summary.layers):,} bytes" in done.stdout
    for row in summary.layers:
        shape = "x".join(map(str, row.shape))
        (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == [row.name]]
        assert shape in line
        assert f"{row.weight_bytes} bytes" in line


def test_the_command_line_fails_with_one_sentence_and_code_2(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run("inspect", str(path.parent / "nothing"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"load: there is no file {path.parent / 'nothing'}\n"


@pytest.mark.parametrize("damage", ["truncated", "missing", "shape", "alias"])
def test_inspect_refuses_a_damaged_file_with_one_sentence(
    path: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qupedkern.__main__ import main

    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        rewritten(path, lambda tensors: tensors.pop("4.packed"))
    elif damage == "alias":
        rewritten(path, lambda tensors: tensors.pop("4.packed"), aliases='{"4.packed": "5.packed"}')
    else:
        header, body = parts(path.read_bytes())
        header["__metadata__"]["layers"] = header["__metadata__"]["layers"].replace("[5, 144]", "[5, {}]")
        path.write_bytes(joined(header, body))
    monkeypatch.setattr(sys, "argv", ["qupedkern", "inspect", str(path)])
    assert main() == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"load: {path}: ")
    assert output.err.count("\n") == 1


def test_without_a_command_the_machine_s_table_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qupedkern.__main__ import main

    monkeypatch.setattr(sys, "argv", ["qupedkern"])
    assert main() == 0
    output = capsys.readouterr().out
    assert output.startswith(f"qupedkern {qk.__version__}, Python ")
    assert "soft_quantize" in output
