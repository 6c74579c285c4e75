"""The file a client ships: a packed model for qk.load, or plain tensors where the model is float."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

import qupedkern as qk
from fl.core import Bits
from fl.storage import load_state, save_state


def save_model(model: nn.Module, bits: Bits, path: Path) -> None:
    """Write a model atomically: by qk.save where it is packed, else its state dict as a safetensors file."""
    if bits == "float":
        save_state(path, model.state_dict(), {"bits": "float"})
    else:
        qk.save(model, path)


def load_model(factory: Callable[[], nn.Module], bits: Bits, path: Path) -> nn.Module:
    """The model of a file, in evaluation mode. factory: builds the float model of the same architecture."""
    if bits != "float":
        return qk.load(factory, path).eval()
    model = factory()
    tensors, _ = load_state(path)
    model.load_state_dict(tensors)
    return model.eval()
