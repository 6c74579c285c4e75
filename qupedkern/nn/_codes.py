"""Whether a bit stream of codes is valid: what files and state dicts are held to before a layer takes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from qupedkern.ops import unpack_codes

_PIECE = 2**20  # bytes looked at together: unpacked, 1 to 8 times as many


def codes_problem(pieces: Iterable[Tensor], count: int, bits: int, levels: int) -> str | None:
    """What is wrong with `count` codes of `bits` bits, given as uint8 in pieces of whole multiples of `bits` bytes; or None.

    Every code must be below levels, and the bits behind the last code 0.
    """
    for piece in pieces:
        here = min(count, len(piece) * 8 // bits)
        count -= here
        if levels < 1 << bits:
            largest = int(unpack_codes(piece, bits, (here,)).max())
            if largest >= levels:
                return f"has code {largest}, the layer has {levels} levels"
        unused = 8 * len(piece) - here * bits
        if int(piece[-1]) >> (8 - unused):
            return "has bits behind its last code, which must be 0"
    return None


def pieces_of(packed: Tensor, bits: int) -> Iterator[Tensor]:
    """A bit stream in such pieces."""
    return iter(packed.split(_PIECE // bits * bits))
