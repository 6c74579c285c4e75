"""Packed files: exact round trips, atomic writes, inspect."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_models import X, factory, joined, packed, packed_zoo, parts, rewritten, state
from torch import Tensor, nn

import qupedkern as qk
from qupedkern.files import write_atomically
from qupedkern.files.inspect import inspect
from qupedkern.files.read import open_packed
from qupedkern.nn import KINDS, packed_layers


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    qk.save(packed(), file)
    return file


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
    expected = qk.pack_(model)(x)
    qk.save(model, tmp_path / "m.safetensors")
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
    with open_packed(path) as file:
        header = file.header
    assert list(header.layers) == list(packed_layers(model))
    for name, layer in packed_layers(model).items():
        record = header.layers[name]
        assert (record.levels, record.bits, record.groups, record.shape) == (3, 2, 1, layer.weight_shape)


def test_a_loaded_model_has_nothing_more_to_do_with_its_file(path: Path) -> None:
    # tensors that were a map of the file changed with it, past every check, and a file that was cut ended the process
    model = qk.load(factory, path)
    before, expected = state(model), model(X)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert state(model) == before
    path.write_bytes(b"")
    assert torch.equal(model(X), expected)


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


def test_what_the_model_shares_must_be_one_tensor_in_the_file(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.a, self.b, self.layer = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 4)
            if shared:
                self.b.weight = self.a.weight

    for shared in (False, True):
        model = Pair(shared)
        qk.quantize_weights_(model, rule=lambda *_: True)
        qk.save(model, tmp_path / str(shared))
    with pytest.raises(qk.FileError, match=r"a.weight and b.weight are one tensor in the model and two in the file$"):
        qk.load(lambda: Pair(True), tmp_path / "False")
    qk.load(lambda: Pair(False), tmp_path / "True")


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


_KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import qupedkern as qk
from packed_models import packed
from qupedkern.files import container

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def half(path, tensors, metadata, whole=container.write):
    whole(path, tensors, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    die()

new, path, moment = packed(seed=1), sys.argv[2], sys.argv[3]
if moment == "write":
    container.write = half
else:
    setattr(os, moment, die)
print("ready", flush=True)
while True:
    qk.save(new, path)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("moment", ["write", "replace", "0.005", "0.02"])
def test_a_killed_process_leaves_the_old_file_or_the_new_one(path: Path, moment: str) -> None:
    """Killed where it hurts most, and at any time."""
    old = path.read_bytes()
    qk.save(packed(seed=1), path.with_name("new"))
    new = path.with_name("new").read_bytes()
    anytime = moment[0].isdigit()
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(Path(__file__).parent), str(path), "getpriority" if anytime else moment],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if anytime:
        time.sleep(float(moment))
        process.kill()
    process.stdout.close()
    assert process.wait(60) == -signal.SIGKILL
    left = path.read_bytes()
    assert left == old or (anytime and left == new)
    qk.load(factory, path)
    qk.save(packed(seed=1), path)  # what a killed process left behind is in nobody's way
    assert path.read_bytes() == new


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


def test_a_file_that_an_earlier_version_wrote_is_read() -> None:
    """tests/data/format_1.safetensors: 3 levels a channel, written through the safetensors package before files/ was there."""

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding="same", padding_mode="reflect"),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(144, 5, bias=False),
            nn.Linear(5, 3),
        )

    loaded = qk.load(model, Path(__file__).parent / "data" / "format_1.safetensors")
    values = [layer.weight.detach() for layer in packed_layers(loaded).values()]
    assert [tuple(value.shape) for value in values] == [(4, 1, 3, 3), (5, 144), (3, 5)]
    content = b"".join(value.numpy().tobytes() for value in values)
    assert hashlib.sha256(content).hexdigest() == "a257a44b0703c9258578024c459df753e0f1e2391982f67adc47fa1cc3f20a6d"


# -- the command line -----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "qupedkern", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("groups", ["tensor", "channel"])
def test_inspect_adds_up_to_the_file_and_agrees_with_summary(path: Path, groups: str) -> None:
    model = packed_zoo(groups=groups)
    qk.save(model, path)
    found, expected = inspect(path), qk.summary(model)
    assert sum(row.total_bytes for row in found.layers) + found.other_bytes + found.header_bytes == found.file_bytes
    assert found.file_bytes == path.stat().st_size
    assert (found.file_bytes - found.header_bytes, found.other_bytes) == (expected.total_bytes, expected.other_bytes)
    assert found.float_bytes == expected.float_bytes
    layers = packed_layers(model)
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        for field in ("name", "kind", "shape", "levels", "bits", "groups", "bits_per_weight", "total_bytes"):
            assert getattr(ours, field) == getattr(theirs, field), field
        layer, own = layers[ours.name], ours.name != "tied"
        assert ours.codes_bytes == own * layer.packed.nbytes
        assert ours.centers_bytes == own * layer.centers.nbytes
        assert ours.bias_bytes == (0 if layer.bias is None else layer.bias.nbytes)
    assert {row.kind for row in found.layers} == set(KINDS)


def test_the_command_prints_every_layer_s_sizes_and_those_of_the_file(path: Path) -> None:
    qk.save(packed_zoo(), path)
    done, found = run("inspect", str(path)), inspect(path)
    assert (done.returncode, done.stderr) == (0, "")
    title, header, *lines, last = done.stdout.splitlines()
    assert title == f"{path}: packed model, format 1, written by qupedkern {qk.__version__}"
    assert header.split() == [
        "layer",
        "kind",
        "shape",
        "levels",
        "groups",
        "bits/weight",
        "codes",
        "centers",
        "bias",
        "bytes",
    ]
    for row, line in zip(found.layers, lines, strict=False):
        bits = f"{row.bits_per_weight:.2f}" if row.codes_bytes else "shared"
        sizes = (row.codes_bytes, row.centers_bytes, row.bias_bytes, row.total_bytes)
        expected = [row.name, row.kind, "x".join(map(str, row.shape)), row.levels, row.groups, bits, *sizes]
        assert line.split() == [str(cell) for cell in expected]
    totals = [line.split() for line in lines[len(found.layers) :]]
    assert totals == [
        [f"{found.other_tensors}", "others", f"{found.other_bytes:,}"],
        ["header", f"{found.header_bytes:,}"],
        ["file", f"{path.stat().st_size:,}"],
    ]
    ends = {len(line) for line in (header, *lines)}
    assert len(ends) == 1  # one column under the other
    assert f"tensors {path.stat().st_size - found.header_bytes:,} bytes" in last


def test_the_command_prints_json(path: Path) -> None:
    qk.save(packed_zoo(), path)
    done = run("inspect", "--json", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    table = json.loads(done.stdout)
    assert table == inspect(path).as_dict()
    total = sum(layer["total_bytes"] for layer in table["layers"]) + table["other_bytes"] + table["header_bytes"]
    assert total == table["file_bytes"] == path.stat().st_size


def test_a_reader_that_stops_reading_is_no_error(path: Path) -> None:
    command = f'"{sys.executable}" -m qupedkern inspect --json "{path}"'
    done = subprocess.run(["sh", "-c", f"{command} | true"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


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
