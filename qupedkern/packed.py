"""Packed models in safetensors files: save, load, load_. No pickle; everything is validated before anything is built."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from qupedkern._version import __version__
from qupedkern.nn import PackedConv2d, PackedLayer, PackedLinear, packed_layers, quantized_layers
from qupedkern.nn.convert import replace_modules
from qupedkern.ops import unpack_codes

FORMAT = "qupedkern"
FORMAT_VERSION = 1
KINDS: dict[str, type[PackedLayer]] = {"linear": PackedLinear, "conv2d": PackedConv2d}
_FLOAT_KIND: dict[str, type[nn.Module]] = {"linear": nn.Linear, "conv2d": nn.Conv2d}


class FileError(ValueError):
    """A file that is not a packed model, or not one of this model: one sentence says which part and why."""


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
    kind = next(name for name, packed in KINDS.items() if type(layer) is packed)
    shape = tuple(layer.weight_shape)
    arguments = layer.arguments()  # type: ignore[operator]
    has_bias = getattr(layer, "bias", None) is not None
    return LayerRecord(kind, layer.levels, layer.bits, layer.num_groups, shape, arguments, has_bias)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a packed model as one safetensors file, atomically: codes at `bits` bits a weight, centers, and the rest as it is.

    model: packed by pack_ (quantized layers that are not packed yet are refused).  path: replaced only once the new file
    is complete. Raises ValueError for a model without packed layers, OSError where the file cannot be written.
    """
    unpacked = quantized_layers(model)
    layers = packed_layers(model)
    if unpacked or not layers:
        what = f"has layers that are not packed ({', '.join(unpacked)})" if unpacked else "has no packed layers"
        raise ValueError(f"save: the model {what}; call pack_ on it first")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in stored:
            aliases[name] = stored[id(tensor)]
        else:
            stored[id(tensor)] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "library_version": __version__,
        "layers": json.dumps({name: asdict(record_of(layer)) for name, layer in layers.items()}, sort_keys=True),
        "aliases": json.dumps(aliases, sort_keys=True),
    }
    content = _sorted_metadata(safetensors.torch.save(tensors, metadata))
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(content))


def _sorted_metadata(content: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors writes them in hash order, and equal models must be equal bytes."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary file beside path, then rename it: path holds the old content or the new, never a part."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _fail(path: Any, problem: str) -> FileError:
    return FileError(f"load: {os.fspath(path)}: {problem}")


def _read_record(path: Any, name: str, raw: Any) -> LayerRecord:
    fields = set(LayerRecord.__dataclass_fields__)
    if not isinstance(raw, dict) or set(raw) != fields:
        raise _fail(path, f"layer {name!r} must be described by {', '.join(sorted(fields))}")
    record = LayerRecord(**{**raw, "shape": tuple(raw["shape"]) if isinstance(raw["shape"], list) else ()})
    if record.kind not in KINDS:
        raise _fail(path, f"layer {name!r} has kind {record.kind!r}, this version knows {', '.join(KINDS)}")
    for field, low, high in (("levels", 2, 256), ("bits", 1, 8), ("groups", 1, 2**40)):
        value = getattr(record, field)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _fail(path, f"layer {name!r} needs {field} from {low} to {high}, got {value!r}")
    if record.bits != (record.levels - 1).bit_length():
        raise _fail(
            path, f"layer {name!r} has {record.levels} levels, which take another number of bits than {record.bits}"
        )
    if not isinstance(record.arguments, dict) or not isinstance(record.bias, bool):
        raise _fail(path, f"layer {name!r} needs arguments as a table and bias as true or false")
    return record


def read_header(path: str | os.PathLike[str]) -> Header:
    """The metadata of a packed model's file, validated. Raises FileError, or FileNotFoundError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"load: there is no file {os.fspath(path)}")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise _fail(path, f"not a readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise _fail(path, f"not a packed model of this library (format {metadata.get('format')!r}, needed {FORMAT!r})")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        came = metadata.get("format_version")
        raise _fail(path, f"written in format version {came!r}, this version reads {FORMAT_VERSION}; update qupedkern")
    try:
        layers, aliases = json.loads(metadata["layers"]), json.loads(metadata["aliases"])
    except (KeyError, json.JSONDecodeError, RecursionError) as error:
        raise _fail(path, f"its metadata cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(layers, dict) or not layers or not isinstance(aliases, dict):
        raise _fail(path, "its metadata names no layers")
    if not all(isinstance(value, str) for value in aliases.values()):
        raise _fail(path, "its metadata must map aliases to names")
    records = {name: _read_record(path, name, raw) for name, raw in layers.items()}
    return Header(FORMAT_VERSION, metadata.get("library_version", "unknown"), records, aliases)


def _check_layer(path: Any, name: str, record: LayerRecord, module: nn.Module | None) -> None:
    """The model's own layer must be what the file describes: shapes come from the model, never from the file alone."""
    if module is None:
        raise _fail(path, f"the model has no layer {name!r}")
    if not isinstance(module, (_FLOAT_KIND[record.kind], KINDS[record.kind])):
        raise _fail(path, f"layer {name!r} is a {record.kind} layer, the model has a {type(module).__name__} there")
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    arguments = (
        module.arguments() if isinstance(module, PackedLayer) else KINDS[record.kind].arguments_of(module)  # type: ignore[operator, attr-defined]
    )
    if tuple(weight.shape) != record.shape or arguments != record.arguments or (bias is not None) != record.bias:
        raise _fail(path, f"layer {name!r} does not fit the model's: file {record.arguments}, model {arguments}")
    if weight.numel() % record.groups:
        raise _fail(
            path, f"layer {name!r} has {record.groups} groups, which do not divide its {weight.numel()} weights"
        )


def _check_tensors(path: Any, name: str, record: LayerRecord, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    needed = {f"{name}.{part}" for part in ("packed", "centers", *(("bias",) if record.bias else ()))}
    came = {key for key in tensors if key.startswith(f"{name}.")}
    if came != needed:
        raise _fail(path, f"layer {name!r} must have the tensors {sorted(needed)}, got {sorted(came)}")
    packed, centers = tensors[f"{name}.packed"], tensors[f"{name}.centers"]
    shapes = {f"{name}.centers": (record.levels,) if record.groups == 1 else (record.groups, record.levels)}
    if record.bias:
        shapes[f"{name}.bias"] = (record.arguments.get("out_features") or record.arguments["out_channels"],)
    for key, shape in shapes.items():
        if tuple(tensors[key].shape) != shape or tensors[key].dtype != dtype:
            came_as = f"{tensors[key].dtype} {tuple(tensors[key].shape)}"
            raise _fail(path, f"{key} must be {dtype} {shape} as in the model, got {came_as}")
    if not bool(centers.isfinite().all()) or bool((centers.diff(dim=-1) < 0).any()):
        raise _fail(path, f"{name}.centers must be finite and ascending")
    try:
        codes = unpack_codes(packed, record.bits, record.shape)
    except (TypeError, ValueError) as error:
        raise _fail(
            path, f"{name}.packed does not hold {record.shape} codes of {record.bits} bits ({error})"
        ) from error
    if codes.numel() and int(codes.max()) >= record.levels:
        raise _fail(path, f"{name}.packed has code {int(codes.max())}, the layer has {record.levels} levels")


def _build(name: str, record: LayerRecord, tensors: dict[str, Tensor], module: nn.Module) -> PackedLayer:
    packed, centers = tensors[f"{name}.packed"], tensors[f"{name}.centers"]
    bias = tensors.get(f"{name}.bias") if record.bias else None
    if record.kind == "linear":
        layer: PackedLayer = PackedLinear(packed=packed, centers=centers, bias=bias, **record.arguments)
    else:
        layer = PackedConv2d(record.arguments, packed, centers, bias)
    return layer.train(module.training)


def load_(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Turn a float (or quantized, or packed) model into the packed one of a file, in place. Returns the model.

    The file is checked against the model before anything changes: format, version, every layer's kind, shape and arguments,
    every tensor's name, shape and type, codes below the levels, centers finite and ascending. Tensors go to the devices
    of the parameters they replace. Raises FileError (a ValueError) with one sentence, or FileNotFoundError.
    """
    header = read_header(path)
    modules = dict(model.named_modules())
    if "" in header.layers:
        raise _fail(path, "the model would itself be the packed layer; wrap it, for example in nn.Sequential")
    for name, record in header.layers.items():
        _check_layer(path, name, record, modules.get(name))
    with safetensors.safe_open(os.fspath(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    for alias, name in header.aliases.items():
        if alias in tensors or name not in tensors:
            raise _fail(path, f"alias {alias!r} of {name!r} points nowhere")
        tensors[alias] = tensors[name]
    for name, record in header.layers.items():
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        _check_tensors(path, name, record, tensors, weight.dtype)
    built = {name: _build(name, record, tensors, modules[name]) for name, record in header.layers.items()}
    replaced = {f"{name}." for name in built}
    own = {k: v for k, v in model.state_dict(keep_vars=True).items() if not any(k.startswith(p) for p in replaced)}
    rest = {k: v for k, v in tensors.items() if not any(k.startswith(p) for p in replaced)}
    if set(own) != set(rest):
        missing, extra = sorted(set(own) - set(rest)), sorted(set(rest) - set(own))
        raise _fail(
            path, f"its tensors do not fit the model (missing {missing or 'none'}, unexpected {extra or 'none'})"
        )
    for name, value in rest.items():
        if value.shape != own[name].shape or value.dtype != own[name].dtype:
            came, needed = f"{value.dtype} {tuple(value.shape)}", f"{own[name].dtype} {tuple(own[name].shape)}"
            raise _fail(path, f"{name} must be {needed}, got {came}")
    _put(model, modules, built, own, rest)
    return model


@torch.no_grad()
def _put(
    model: nn.Module,
    modules: dict[str, nn.Module],
    built: dict[str, PackedLayer],
    own: dict[str, Tensor],
    rest: dict[str, Tensor],
) -> None:
    for name, value in rest.items():
        own[name].copy_(value)
    for name, layer in built.items():
        layer.to(next(modules[name].parameters()).device)
    replace_modules(model, {modules[name]: layer for name, layer in built.items()})


def load(model_factory: Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """A packed model from a file: model_factory() builds the float architecture, load_ fills it.

    Raises FileError (a ValueError) where the file is damaged or belongs to another architecture, FileNotFoundError.
    """
    read_header(path)
    return load_(model_factory(), path)
