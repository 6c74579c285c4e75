"""batch_invariant: whether a row of x must have the same bits whatever batch it comes in."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import ClassVar


class batch_invariant:
    """Pin lut_linear to one kernel regime: `batch_invariant(True)` from here on, `with batch_invariant(True):` for a block.

    Row i of a batch then has the bits it has alone, for every batch, at the price of the kernels made for large batches.
    Without it that holds only between batches of one regime. Seen by every thread, at run time, also in compiled graphs.
    """

    pinned = False
    _listeners: ClassVar[list[Callable[[bool], None]]] = []

    def __init__(self, pinned: bool = True) -> None:
        if not isinstance(pinned, bool):
            raise TypeError(f"batch_invariant: pinned must be True or False, got {type(pinned).__name__}")
        self._pinned, self._before = pinned, batch_invariant.pinned
        self._set(pinned)

    @classmethod
    def _set(cls, pinned: bool) -> None:
        batch_invariant.pinned = pinned
        for listener in cls._listeners:
            listener(pinned)

    @classmethod
    def tell(cls, listener: Callable[[bool], None]) -> None:
        """Call listener(pinned) now and at every change: kernels keep their own copy."""
        cls._listeners.append(listener)
        listener(cls.pinned)

    def __enter__(self) -> batch_invariant:
        if batch_invariant.pinned != self._pinned:  # made earlier, entered now
            self._before = batch_invariant.pinned
            self._set(self._pinned)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set(self._before)
