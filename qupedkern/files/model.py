"""What of a model's state is its layers' own and what is not."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from .read import owner_of


def state_outside(model: nn.Module, layers: Iterable[nn.Module], keep: Collection[str] = ()) -> dict[str, Any]:
    """The model's state dict without the tensors of these layers under any name they have, but for the names to keep."""
    wanted = set(layers)
    names = {name for name, module in model.named_modules(remove_duplicate=False) if module in wanted} - set(keep)
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if owner_of(name) not in names}
