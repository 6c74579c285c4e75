"""A small packed model, its file, and the file taken apart; shared by the tests of packed files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qupedkern as qk


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


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: repr((t.dtype, t.shape, t.tolist())).encode() for name, t in model.state_dict().items()}


def parts(file: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def joined(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


Tensors = dict[str, Tensor]


def rewritten(path: Path, change: Callable[[Tensors], object], **metadata: str) -> None:
    """The same file with its tensors changed and other metadata."""
    tensors = {
        name: t.clone() for name, t in load_file(path).items()
    }  # not the file's own bytes, which are written anew
    change(tensors)
    old = parts(path.read_bytes())[0]["__metadata__"]
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {**old, **metadata})
