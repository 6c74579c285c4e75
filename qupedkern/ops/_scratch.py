"""Memory for a tensor that one call makes and the next one reads: the same for every layer, so that it stays in cache."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_MOST = 1 << 22  # elements kept, 16 MiB of float32; fresh pages cost a larger tensor less than its values do


class _Kept(threading.local):
    """What a thread has: its memory for each type, and the shapes it was lent in."""

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}
        self.views: dict[tuple[torch.dtype, tuple[int, ...]], Tensor] = {}


_kept = _Kept()


def borrow(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
    """A contiguous CPU tensor of any content, this thread's until it borrows the next one; None for a large one."""
    view = _kept.views.get((dtype, shape))
    if view is not None:
        return view
    numel = torch.Size(shape).numel()
    if numel > _MOST:
        return None
    memory = _kept.memory.get(dtype)
    with torch.inference_mode(False):  # the next to borrow it may be outside of inference mode
        if memory is None or memory.numel() < numel:
            memory = _kept.memory[dtype] = torch.empty(numel, dtype=dtype)
            _kept.views = {key: v for key, v in _kept.views.items() if key[0] != dtype}
        view = _kept.views[dtype, shape] = memory[:numel].view(shape)
    return view
