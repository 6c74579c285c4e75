"""What a packed model's file says of itself, in the metadata of its container; read strictly, tensors still untouched."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qupedkern._version import __version__
from qupedkern.nn import KINDS, Kind, PackedLayer, kind_of

from . import strict_json
from .container import is_int
from .errors import refusal

FORMAT = "qupedkern"
FORMAT_VERSION = 1
_LARGEST = 2**40  # of a size, an argument, a number of groups
_MOST_SIZES = 8  # in a shape or an argument
_LONGEST_WORD = 64  # characters of an argument such as a padding mode


@dataclass(frozen=True)
class LayerRecord:
    """What a file says of one packed layer, beside its tensors."""

    kind: str
    levels: int
    bits: int
    groups: int
    shape: tuple[int, ...]
    arguments: dict[str, Any]
    bias: bool


@dataclass(frozen=True)
class Header:
    """The self-describing part of a file: {"format", "format_version", "library_version", "layers", "aliases"}."""

    version: int
    library_version: str
    layers: dict[str, LayerRecord]
    aliases: dict[str, str]  # name of a tensor -> name under which the same tensor is stored


def record_of(layer: PackedLayer) -> LayerRecord:
    kind = kind_of(layer)
    assert kind is not None
    shape, arguments = tuple(layer.weight_shape), layer.arguments_of(layer)
    return LayerRecord(kind.name, layer.levels, layer.bits, layer.num_groups, shape, arguments, layer.bias is not None)


def to_metadata(layers: Mapping[str, LayerRecord], aliases: Mapping[str, str]) -> dict[str, str]:
    """The metadata to write."""
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "library_version": __version__,
        "layers": json.dumps({name: asdict(record) for name, record in layers.items()}),  # in the order of the model
        "aliases": json.dumps(dict(aliases)),
    }


def from_metadata(path: Any, metadata: Mapping[str, str]) -> Header:
    """The same, read back. Raises FileError."""
    if metadata.get("format") != FORMAT:
        raise refusal(
            path, f"not a packed model of this library (format {metadata.get('format')!r}, needed {FORMAT!r})"
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        came = metadata.get("format_version")
        raise refusal(
            path, f"written in format version {came!r}, this version reads {FORMAT_VERSION}; update qupedkern"
        )
    try:
        layers, aliases = strict_json.loads(metadata["layers"]), strict_json.loads(metadata["aliases"])
    except (KeyError, ValueError) as error:
        raise refusal(path, f"its metadata cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(layers, dict) or not layers or not isinstance(aliases, dict):
        raise refusal(path, "its metadata names no layers")
    if not all(isinstance(value, str) for value in aliases.values()):
        raise refusal(path, "its metadata must map aliases to names")
    library = metadata.get("library_version", "unknown")
    for text in (library, *layers):
        if not text.isprintable():
            raise refusal(path, f"names in its metadata must be printable, got {text!r}")
    if "" in layers:
        raise refusal(path, "it holds a layer without a name, and a model cannot itself be the packed layer")
    records = {name: _read_record(path, name, raw) for name, raw in layers.items()}
    return Header(FORMAT_VERSION, library, records, aliases)


def _read_record(path: Any, name: str, raw: Any) -> LayerRecord:
    fields = set(LayerRecord.__dataclass_fields__)
    if not isinstance(raw, dict) or set(raw) != fields:
        raise refusal(path, f"layer {name!r} must be described by {', '.join(sorted(fields))}")
    if not isinstance(raw["kind"], str) or raw["kind"] not in KINDS:
        raise refusal(path, f"layer {name!r} has kind {raw['kind']!r}, this version knows {', '.join(KINDS)}")
    for field, low, high in (("levels", 2, 256), ("bits", 1, 8), ("groups", 1, _LARGEST)):
        if not is_int(raw[field], low, high):
            raise refusal(path, f"layer {name!r} needs {field} from {low} to {high}, got {raw[field]!r}")
    if not _is_sizes(raw["shape"], 2, 1):
        needed = f"a shape of two to {_MOST_SIZES} positive sizes"
        raise refusal(path, f"layer {name!r} needs {needed}, got {raw['shape']!r}")
    if not isinstance(raw["arguments"], dict) or not isinstance(raw["bias"], bool):
        raise refusal(path, f"layer {name!r} needs arguments as a table and bias as true or false")
    record = LayerRecord(**{**raw, "shape": tuple(raw["shape"])})
    if record.bits != (record.levels - 1).bit_length():
        wrong = f"{record.levels} levels, which take another number of bits than {record.bits}"
        raise refusal(path, f"layer {name!r} has {wrong}")
    if math.prod(record.shape) % record.groups:
        raise refusal(path, f"layer {name!r} has {record.groups} groups, which do not divide its shape {record.shape}")
    problem = _arguments_problem(KINDS[record.kind], record)
    if problem is not None:
        raise refusal(path, f"layer {name!r} has {problem}")
    return record


def _is_sizes(value: Any, fewest: int, low: int) -> bool:
    """A list of at most _MOST_SIZES integers."""
    return (
        isinstance(value, list)
        and fewest <= len(value) <= _MOST_SIZES
        and all(is_int(size, low, _LARGEST) for size in value)
    )


def _is_argument(value: Any) -> bool:
    """What the constructor of a torch layer takes: null, a truth value, a number, a word, a list of sizes."""
    if isinstance(value, str):
        return len(value) <= _LONGEST_WORD and value.isprintable()
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool) or is_int(value, 0, _LARGEST) or _is_sizes(value, 1, 0)


def _arguments_problem(kind: Kind, record: LayerRecord) -> str | None:
    """Why the arguments make no layer of the record's shape. The layer they are tried on has no storage."""
    if set(record.arguments) != set(kind.packed.ARGUMENTS):
        return f"arguments {sorted(record.arguments)}, a {kind.name} layer has {sorted(kind.packed.ARGUMENTS)}"
    for key, value in record.arguments.items():
        if not _is_argument(value):
            return f"an argument no layer can have: {key} {value!r}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about layers that are odd but possible
            shape = tuple(kind.packed._empty(record.arguments).weight.shape)  # type: ignore[arg-type]
    except Exception as error:  # whatever torch makes of arguments it was not written for
        return f"arguments that make no {kind.name} layer ({type(error).__name__}: {error})"
    return None if shape == record.shape else f"shape {record.shape}, its arguments make {shape}"
