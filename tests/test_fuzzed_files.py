"""Whatever is in a file: one printable sentence and the model as it was, or a valid model; and little memory either way."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from mutations import mutated
from packed_models import EXAMPLES, Zoo, joined, packed_zoo, parts, state
from safetensors.torch import load_file
from torch import nn

import qupedkern as qk
from qupedkern.files.inspect import inspect
from qupedkern.files.read import open_packed
from qupedkern.nn import KINDS, packed_layers

FILES = 3000 if settings().max_examples < 1000 else 60_000  # the slow profile
FORMS = ({}, {"groups": "channel"}, {"levels": 16}, {"levels": 2, "groups": "channel"})


def sentence(error: qk.FileError, path: Path) -> str:
    """The problem a FileError names, checked for form."""
    text = str(error)
    assert text.startswith(f"load: {path}: ")
    assert text.isprintable()
    problem = text.removeprefix(f"load: {path}: ")
    assert 0 < len(problem) <= 404
    return problem


def check_valid(model: nn.Module, path: Path) -> None:
    """Finite ascending centers, codes below the levels, no stray bits; it runs, and saved again is the same model."""
    for layer in packed_layers(model).values():
        assert bool(layer.centers.isfinite().all())
        assert bool((layer.centers.diff(dim=-1) >= 0).all())
        assert int(layer.codes().max()) < layer.levels
    model()
    again = path.with_suffix(".again")
    qk.save(model, again)
    assert state(qk.load(Zoo, again)) == state(model)


def inspected(path: Path) -> None:
    """A file that does not fit the model may still be a packed model."""
    try:
        found = inspect(path)
    except qk.FileError as error:
        sentence(error, path)
        return
    assert all(line.isprintable() for line in str(found).split("\n"))
    json.dumps(found.as_dict())


def test_a_damaged_file_is_refused_or_gives_a_valid_model(tmp_path: Path) -> None:
    path, rng = tmp_path / "model.safetensors", random.Random(0)
    originals = []
    for options in FORMS:
        qk.save(packed_zoo(**options), path)
        originals.append(path.read_bytes())
    model = Zoo()
    before, modules = state(model), list(model.modules())
    refused: Counter[str] = Counter()
    loaded = 0
    for index in range(FILES):
        path.unlink()  # a new file: writing over an old one makes some systems wait for the disk
        content = mutated(originals[index % len(FORMS)], rng)
        path.write_bytes(content)
        try:
            qk.load_(model, path)
        except qk.FileError as error:
            problem = sentence(error, path)
            refused[re.sub(r"[^a-z ]|'.*?'|\b(layers|tied|norm|head)\b\S*", "", problem)[:40]] += 1
            assert list(model.modules()) == modules, (index, problem)
            if index % 4 == 0:
                inspected(path)
            if index % 16 == 0:
                assert state(model) == before, (index, problem)
            continue
        loaded += 1
        check_valid(model, path)
        found = inspect(path)  # which agrees with load
        assert sum(row.total_bytes for row in found.layers) + found.other_bytes + found.header_bytes == len(content)
        load_file(path)  # and the safetensors package with both
        model = Zoo()
        before, modules = state(model), list(model.modules())
    assert loaded > FILES // 50, loaded
    assert len(refused) > 60, refused  # every check is reached, not the first one always
    assert state(model) == before


def test_every_kind_of_layer_is_in_the_fuzzed_files(tmp_path: Path) -> None:
    assert set(EXAMPLES) >= set(KINDS)
    qk.save(packed_zoo(), tmp_path / "model")
    with open_packed(tmp_path / "model") as file:
        assert {record.kind for record in file.header.layers.values()} == set(KINDS)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_kind_of_layer_comes_back_to_the_bit(
    tmp_path: Path, options: dict[str, object], dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    model = Zoo().to(dtype)
    qk.quantize_weights_(model, rule=lambda name, _: name != "head", **{"levels": 3, **options})
    qk.save(model, tmp_path / "model")
    loaded = qk.load(lambda: Zoo().to(dtype), tmp_path / "model")
    assert state(loaded) == state(model)
    assert [type(layer) for layer in packed_layers(loaded).values()] == [
        type(layer) for layer in packed_layers(model).values()
    ]
    assert loaded.tied.packed is loaded.layers["linear"].packed
    qk.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()


ARGUMENTS = {
    "stride": ([10**18], "an argument no layer can have: stride [1000000000000000000]"),
    "dilation": ([-1, -1], "an argument no layer can have: dilation [-1, -1]"),
    "kernel_size": ([3, 3], "has shape (6, 2, 3, 2), its arguments make (6, 2, 3, 3)"),
    "in_channels": (2**40, "has shape (6, 2, 3, 2), its arguments make (6, 549755813888, 3, 2)"),
    "out_channels": (7, "arguments that make no conv2d layer (ValueError: out_channels must be divisible by groups)"),
    "groups": (0, "arguments that make no conv2d layer (ValueError: groups must be a positive integer)"),
    "padding": ("../../etc", "arguments that make no conv2d layer (ValueError: Invalid padding string '../../etc'"),
    "padding_mode": ("x" * 65, "an argument no layer can have: padding_mode 'xxx"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_make_no_such_layer_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model"
    qk.save(packed_zoo(), path)
    header, body = parts(path.read_bytes())
    layers = json.loads(header["__metadata__"]["layers"])
    layers["layers.conv2d"]["arguments"][name], expected = ARGUMENTS[name]
    header["__metadata__"]["layers"] = json.dumps(layers)
    path.write_bytes(joined(header, body))
    with pytest.raises(qk.FileError) as caught:
        qk.load(Zoo, path)
    assert expected in sentence(caught.value, path)


# -- memory ---------------------------------------------------------------------------------------------------------------

_MEASURE = """
import json, resource, sys
import torch
sys.path.insert(0, sys.argv[2])
from packed_models import Zoo
import qupedkern as qk
from qupedkern.files.inspect import inspect
from qupedkern.files.read import open_packed
def checked(path):
    with open_packed(path) as file:
        file.check()
qk.load(Zoo, sys.argv[3])  # what loading takes without any damage
checked(sys.argv[3])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outcomes = {}
for path in sys.argv[4:]:
    for what, call in (("load", lambda: qk.load(Zoo, path)), ("check", lambda: checked(path))):
        try:
            call()
            outcome = "fine"
        except qk.FileError as error:
            outcome = str(error).removeprefix(f"load: {path}: ")
        outcomes[f"{what} {path.rpartition('/')[2]}"] = outcome
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, outcomes]))
"""


def lying(path: Path, original: bytes, name: str, dtype: str, size: list[int], **fields: Any) -> None:
    """A file whose tensor `name` has this type and size, sparse on the disk, and whose layer is described to match."""
    header, body = parts(original)
    entry = header.pop(name)
    begin, end = entry["data_offsets"]
    length = {"U8": 1, "F32": 4}[dtype] * math.prod(size)
    for other in header.values():
        if "data_offsets" in other and other["data_offsets"][0] >= end:
            other["data_offsets"] = [offset - (end - begin) for offset in other["data_offsets"]]
    rest = body[:begin] + body[end:]
    header[name] = {"dtype": dtype, "shape": size, "data_offsets": [len(rest), len(rest) + length]}
    layers = json.loads(header["__metadata__"]["layers"])
    layer = layers.get(name.rpartition(".")[0], {})
    layer.update({key: value for key, value in fields.items() if key != "arguments"})
    layer.get("arguments", {}).update(fields.get("arguments", {}))
    header["__metadata__"]["layers"] = json.dumps(layers)
    path.write_bytes(joined(header, rest))
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size + length)


def test_no_file_makes_loading_allocate_more_than_the_model_and_its_header(tmp_path: Path) -> None:
    """Sizes are given as TiB (sparse files), as lies of the header, or as headers of 16 MiB; peaks are the process's own."""
    model, large = tmp_path / "model", 2**27
    qk.save(packed_zoo(), model)
    original = model.read_bytes()
    lying(tmp_path / "buffer", original, "flags", "U8", [2**42])
    lying(tmp_path / "norm", original, "norm.weight", "F32", [2**38])
    lying(tmp_path / "codes", original, "layers.conv2d.packed", "U8", [2**40])
    lying(tmp_path / "rows", original, "layers.conv2d.centers", "F32", [2**36, 3], groups=2**36)
    fields = {"shape": [large, 2, 3], "arguments": {"out_channels": large}}  # consistent: only the model says otherwise
    lying(tmp_path / "layer", original, "layers.conv1d.packed", "U8", [large * 6 // 4], **fields)
    header, body = parts(original)
    for name, filler in (("flat", "1," * 7_900_000), ("nested", "[" * 15_000_000)):
        metadata = {**header["__metadata__"], "layers": f"[{filler}1]"}
        (tmp_path / name).write_bytes(joined({**header, "__metadata__": metadata}, body))
    files = {
        "buffer": "flags must be torch.bool (3,), got torch.uint8 (4398046511104,)",
        "norm": "norm.weight must be torch.float32 (5,), got",
        "codes": "layers.conv2d.packed does not hold (6, 2, 3, 2) codes of 2 bits (18 bytes), got",
        "rows": "layer 'layers.conv2d' has 68719476736 groups, which do not divide",
        "layer": "layer 'layers.conv1d' does not fit the model's: file torch.float32 (134217728, 2, 3)",
        "flat": "its metadata names no layers",
        "nested": "its metadata cannot be read (ValueError: it is nested too deeply)",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _MEASURE,
            "",
            str(Path(__file__).parent),
            str(model),
            *(str(tmp_path / f) for f in files),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown_kib, outcomes = json.loads(done.stdout)
    for name, expected in files.items():
        assert outcomes[f"load {name}"].startswith(expected), outcomes
    assert outcomes["check layer"] == "fine"  # 192 MiB of codes, looked through in pieces
    # A header of 16 MiB is held as bytes, as text, decoded, and parsed: of "1," every two characters make a pointer of 8.
    assert grown_kib < 128 * 1024, (grown_kib, outcomes)
