"""Packed models in safetensors files: save, load, load_. No pickle; everything is validated before anything is built."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from qupedkern._version import __version__
from qupedkern.nn import KINDS, PackedLayer, kind_of, packed_layers, quantized_layers
from qupedkern.nn._quantized import check_model, sorted_codebook
from qupedkern.nn.convert import replace_modules
from qupedkern.ops import pack_codes, unpack_codes

FORMAT = "qupedkern"
FORMAT_VERSION = 1
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_LONGEST_PROBLEM = 400  # characters of an error: it may quote the file


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
    kind = kind_of(layer)
    assert kind is not None
    shape, arguments = tuple(layer.weight_shape), layer.arguments_of(layer)
    return LayerRecord(kind.name, layer.levels, layer.bits, layer.num_groups, shape, arguments, layer.bias is not None)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a packed model as one safetensors file, atomically: codes at `bits` bits a weight, centers, and the rest as it is.

    model: packed by pack_ (quantized layers that are not packed yet are refused).  path: replaced only once the new file
    is complete. Centers that training has made cross are written in order, with their codes; the model stays as it is.
    Raises ValueError for a model without packed layers, with centers that are not finite or with a state that is not
    tensors, OSError where the file cannot be written.
    """
    check_model("save", model)
    unpacked = quantized_layers(model)
    layers = packed_layers(model)
    if unpacked or not layers:
        what = f"has layers that are not packed ({', '.join(unpacked)})" if unpacked else "has no packed layers"
        raise ValueError(f"save: the model {what}; call pack_ on it first")
    if "" in layers:
        raise ValueError("save: the model is itself a packed layer; wrap it, for example in nn.Sequential")
    in_order: dict[int, Tensor] = {}
    for name, layer in layers.items():
        in_order.update(_in_order(name, layer))
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[int, str] = {}
    for name, tensor in _state_outside(model, _names_of(model, layers.values()) - set(layers)).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"save: the state of the model must be tensors, got {type(tensor).__name__} for {name}")
        if id(tensor) in stored:
            aliases[name] = stored[id(tensor)]
        else:
            stored[id(tensor)] = name
            # cloned, for tensors that are views of one another cannot share a file
            value = in_order.get(id(tensor), tensor)
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
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


@torch.no_grad()
def _in_order(name: str, layer: PackedLayer) -> dict[int, Tensor]:
    """What to write in place of a layer's codes and centers where its centers have crossed; a file has them ascending."""
    if not bool(layer.centers.isfinite().all()):
        raise ValueError(f"save: the centers of {name} must be finite, got a NaN or an infinity")
    if bool((layer.centers.diff(dim=-1) >= 0).all()):
        return {}
    codes, centers = sorted_codebook(layer.codes(), layer.centers)
    return {id(layer.packed): pack_codes(codes, layer.bits), id(layer.centers): centers}


def _names_of(model: nn.Module, layers: Iterable[nn.Module]) -> set[str]:
    """Every name under which the model reaches these modules."""
    wanted = set(layers)
    return {name for name, module in model.named_modules(remove_duplicate=False) if module in wanted}


def _owner(tensor_name: str) -> str:
    """The module of a tensor: "0.conv.weight" -> "0.conv"."""
    return tensor_name.rpartition(".")[0]


def _state_outside(model: nn.Module, modules: set[str]) -> dict[str, Any]:
    """The model's state dict without the tensors of these modules."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if _owner(name) not in modules}


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary file `.<name>.*.tmp` beside path, then rename it: path holds the old content or the new.

    So also after a power cut, where the system can make a rename survive one.
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        problem = "is a folder" if target.is_dir() else "is in a folder that does not exist"
        raise OSError(f"save: the path must name a file in an existing folder, {os.fspath(path)} {problem}")
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
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
    if os.name == "posix":  # Windows cannot open folders
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _fail(path: Any, problem: str) -> FileError:
    """One line, whatever the file holds."""
    problem = "".join(character if character.isprintable() else "?" for character in problem[: _LONGEST_PROBLEM + 1])
    if len(problem) > _LONGEST_PROBLEM:
        problem = problem[:_LONGEST_PROBLEM] + " ..."
    return FileError(f"load: {os.fspath(path)}: {problem}")


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _read_record(path: Any, name: str, raw: Any) -> LayerRecord:
    fields = set(LayerRecord.__dataclass_fields__)
    if not isinstance(raw, dict) or set(raw) != fields:
        raise _fail(path, f"layer {name!r} must be described by {', '.join(sorted(fields))}")
    if not isinstance(raw["kind"], str) or raw["kind"] not in KINDS:
        raise _fail(path, f"layer {name!r} has kind {raw['kind']!r}, this version knows {', '.join(KINDS)}")
    for field, low, high in (("levels", 2, 256), ("bits", 1, 8), ("groups", 1, 2**40)):
        if not _is_int(raw[field], low, high):
            raise _fail(path, f"layer {name!r} needs {field} from {low} to {high}, got {raw[field]!r}")
    shape = raw["shape"]
    if not isinstance(shape, list) or len(shape) < 2 or not all(_is_int(size, 1, 2**40) for size in shape):
        raise _fail(path, f"layer {name!r} needs a shape of two or more positive sizes, got {shape!r}")
    if not isinstance(raw["arguments"], dict) or not isinstance(raw["bias"], bool):
        raise _fail(path, f"layer {name!r} needs arguments as a table and bias as true or false")
    record = LayerRecord(**{**raw, "shape": tuple(shape)})
    if record.bits != (record.levels - 1).bit_length():
        wrong = f"{record.levels} levels, which take another number of bits than {record.bits}"
        raise _fail(path, f"layer {name!r} has {wrong}")
    if math.prod(record.shape) % record.groups:
        raise _fail(path, f"layer {name!r} has {record.groups} groups, which do not divide its shape {record.shape}")
    return record


def read_header(path: str | os.PathLike[str]) -> Header:
    """The metadata of a packed model's file, validated. Raises FileError, or FileNotFoundError."""
    if not Path(path).exists():
        raise FileNotFoundError(f"load: there is no file {os.fspath(path)}")
    with _opened(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise _fail(path, f"not a packed model of this library (format {metadata.get('format')!r}, needed {FORMAT!r})")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        came = metadata.get("format_version")
        raise _fail(path, f"written in format version {came!r}, this version reads {FORMAT_VERSION}; update qupedkern")
    try:
        layers, aliases = json.loads(metadata["layers"]), json.loads(metadata["aliases"])
    except (KeyError, ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
        raise _fail(path, f"its metadata cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(layers, dict) or not layers or not isinstance(aliases, dict):
        raise _fail(path, "its metadata names no layers")
    if not all(isinstance(value, str) for value in aliases.values()):
        raise _fail(path, "its metadata must map aliases to names")
    library = metadata.get("library_version", "unknown")
    for text in (library, *layers):
        if not text.isprintable():
            raise _fail(path, f"names in its metadata must be printable, got {text!r}")
    if "" in layers:
        raise _fail(path, "it holds a layer without a name, and a model cannot itself be the packed layer")
    records = {name: _read_record(path, name, raw) for name, raw in layers.items()}
    return Header(FORMAT_VERSION, library, records, aliases)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """An open safetensors file; whatever its reader objects to becomes a FileError."""
    if not Path(path).is_file():
        raise _fail(path, "not a file")
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            yield file
    except FileError:
        raise
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise _fail(path, f"not a readable safetensors file ({error})") from error


def read_tensors(path: str | os.PathLike[str], header: Header) -> dict[str, Tensor]:
    """Every tensor of the file by name, aliases included; each layer's are what its record says. Raises FileError."""
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    stored = set(tensors)
    for alias, name in header.aliases.items():
        if alias in stored or name not in stored:
            raise _fail(path, f"alias {alias!r} of {name!r} points nowhere")
        tensors[alias] = tensors[name]
    parts: dict[str, set[str]] = {name: set() for name in header.layers}
    for name in tensors:
        parts.get(_owner(name), set()).add(name)
    for name, record in header.layers.items():
        needed = {f"{name}.{part}" for part in ("packed", "centers", *(("bias",) if record.bias else ()))}
        if parts[name] != needed:
            raise _fail(path, f"layer {name!r} must have the tensors {sorted(needed)}, got {sorted(parts[name])}")
        _check_tensors(path, name, record, tensors)
    return tensors


def _check_tensors(path: Any, name: str, record: LayerRecord, tensors: dict[str, Tensor]) -> None:
    """A layer's tensors have the shapes of its record, one float type, ascending centers and codes below the levels."""
    packed, centers = tensors[f"{name}.packed"], tensors[f"{name}.centers"]
    shapes = {f"{name}.centers": (record.levels,) if record.groups == 1 else (record.groups, record.levels)}
    if record.bias:
        shapes[f"{name}.bias"] = (KINDS[record.kind].packed.bias_length(record.arguments, record.shape),)
    for key, shape in shapes.items():
        came = tensors[key]
        if tuple(came.shape) != shape or came.dtype != centers.dtype or came.dtype not in _FLOATS:
            needed = f"{shape} of one float type in the layer"
            raise _fail(path, f"{key} must be {needed}, got {came.dtype} {tuple(came.shape)}")
    if not bool(centers.isfinite().all()) or bool((centers.diff(dim=-1) < 0).any()):
        raise _fail(path, f"{name}.centers must be finite and ascending")
    try:
        codes = unpack_codes(packed, record.bits, record.shape)
    except (TypeError, ValueError) as error:
        problem = f"{name}.packed does not hold {record.shape} codes of {record.bits} bits ({error})"
        raise _fail(path, problem) from error
    if int(codes.max()) >= record.levels:
        raise _fail(path, f"{name}.packed has code {int(codes.max())}, the layer has {record.levels} levels")


def _check_layer(path: Any, name: str, record: LayerRecord, module: nn.Module | None, dtype: torch.dtype) -> None:
    """The model's own layer must be what the file describes, and of its type."""
    if module is None:
        raise _fail(path, f"the model has no layer {name!r}")
    if kind_of(module) is not KINDS[record.kind]:
        raise _fail(path, f"layer {name!r} is a {record.kind} layer, the model has a {type(module).__name__} there")
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    if tuple(weight.shape) != record.shape or weight.dtype != dtype or (bias is not None) != record.bias:
        came = f"{dtype} {record.shape}, {'with' if record.bias else 'without'} bias"
        own = f"{weight.dtype} {tuple(weight.shape)}, {'without' if bias is None else 'with'} bias"
        raise _fail(path, f"layer {name!r} does not fit the model's: file {came}; model {own}")
    arguments = KINDS[record.kind].packed.arguments_of(module)
    if arguments != record.arguments:
        raise _fail(path, f"layer {name!r} does not fit the model's: file {record.arguments}, model {arguments}")


def _build(name: str, record: LayerRecord, tensors: dict[str, Tensor], module: nn.Module) -> PackedLayer:
    packed, centers = tensors[f"{name}.packed"], tensors[f"{name}.centers"]
    bias = tensors.get(f"{name}.bias") if record.bias else None
    form = KINDS[record.kind].packed
    layer = form(form.arguments_of(module), packed, centers, bias)  # the model's arguments, with which the file's agree
    own_centers, own_bias = getattr(module, "centers", module.weight), getattr(module, "bias", None)
    assert isinstance(own_centers, Tensor)
    layer.centers.requires_grad_(own_centers.requires_grad)
    if isinstance(layer.bias, Tensor) and isinstance(own_bias, Tensor):
        layer.bias.requires_grad_(own_bias.requires_grad)
    return layer.train(module.training)


def load_(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Turn a float (or quantized, or packed) model into the packed one of a file, in place. Returns the model.

    The file is checked against the model before anything changes: format, version, every layer's kind, shape and arguments,
    every tensor's name, shape and type, codes below the levels, centers finite and ascending. Tensors go to the devices
    of the parameters they replace, and are trainable where those were. Raises FileError (a ValueError) with one sentence,
    FileNotFoundError, or ValueError for a model without storage.
    """
    check_model("load_", model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise ValueError(
                f"load_: the model must hold its tensors, got {name} on the meta device; build it on a real one"
            )
    header = read_header(path)
    tensors = read_tensors(path, header)
    modules = dict(model.named_modules())
    for name, record in header.layers.items():
        _check_layer(path, name, record, modules.get(name), tensors[f"{name}.centers"].dtype)
    built = {name: _build(name, record, tensors, modules[name]) for name, record in header.layers.items()}
    _tie(built, header.aliases)
    own = _state_outside(model, _names_of(model, (modules[name] for name in built)))
    rest = {name: value for name, value in tensors.items() if _owner(name) not in built}
    if set(own) != set(rest):
        missing, extra = sorted(set(own) - set(rest)), sorted(set(rest) - set(own))
        raise _fail(
            path, f"its tensors do not fit the model (missing {missing or 'none'}, unexpected {extra or 'none'})"
        )
    for name, value in rest.items():
        if not isinstance(own[name], Tensor) or value.shape != own[name].shape or value.dtype != own[name].dtype:
            needed = f"{getattr(own[name], 'dtype', 'no tensor')} {tuple(getattr(own[name], 'shape', ()))}"
            raise _fail(path, f"{name} must be {needed}, got {value.dtype} {tuple(value.shape)}")
    _put(model, modules, built, own, rest)
    return model


def _tie(built: dict[str, PackedLayer], aliases: dict[str, str]) -> None:
    """Layers that shared codes, centers or a bias when they were saved share them again."""
    for alias, name in aliases.items():
        part = alias.rpartition(".")[2]
        layer, owner = built.get(_owner(alias)), built.get(_owner(name))
        if layer is not None and owner is not None and part == name.rpartition(".")[2]:
            setattr(layer, part, getattr(owner, part))


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
    if not callable(model_factory) or isinstance(model_factory, nn.Module):
        raise TypeError(
            f"load: model_factory must be a function that builds the model, got {type(model_factory).__name__}"
        )
    return load_(model_factory(), path)
