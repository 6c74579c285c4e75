"""Tables in plain text, for summary and inspect."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_WIDEST = 60  # characters of a cell: names may come from a file


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> list[str]:
    """The lines of a table: columns as wide as their longest cell, those named in `left` aligned to the left."""
    cells = [[_shortened(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ).rstrip()
        for row in cells
    ]


def _shortened(cell: str) -> str:
    return cell if len(cell) <= _WIDEST else f"{cell[: _WIDEST - 23]} ... {cell[-18:]}"
