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
from qupedkern.nn import KINDS


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


EXAMPLES: dict[str, Callable[[], nn.Module]] = {  # one layer of each kind; a new kind needs one here
    "linear": lambda: nn.Linear(6, 5),
    "conv1d": lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular", bias=False),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    "embedding": lambda: nn.Embedding(7, 5, padding_idx=2),
    "embedding_bag": lambda: nn.EmbeddingBag(7, 5, mode="mean"),
}
INPUTS: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: torch.linspace(-1, 1, 12).reshape(2, 6),
    "conv1d": lambda: torch.linspace(-1, 1, 20).reshape(1, 2, 10),
    "conv2d": lambda: torch.linspace(-1, 1, 144).reshape(1, 4, 6, 6),
    "conv_transpose2d": lambda: torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4),
    "embedding": lambda: torch.tensor([[0, 6, 2]]),
    "embedding_bag": lambda: torch.tensor([[0, 6, 2], [1, 1, 3]]),
}


class Zoo(nn.Module):
    """A layer of every kind, a batch norm, a layer that shares the first one's weight, and one that stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({kind: EXAMPLES[kind]() for kind in KINDS})
        self.tied, self.norm, self.head = nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.tied.weight = self.layers["linear"].weight
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.eval()

    def forward(self) -> list[Tensor]:
        outputs = [layer(INPUTS[kind]()) for kind, layer in self.layers.items()]
        return [*outputs, self.head(self.norm(self.tied(INPUTS["linear"]())))]


def packed_zoo(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = Zoo()
    qk.quantize_weights_(model, rule=lambda name, _: name != "head", **{"levels": 3, **options})
    return model


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
