"""JSON of a file that may be hostile: no name twice, no NaN, no number of thousands of digits, any nesting survived."""

from __future__ import annotations

import json
from typing import Any

_MOST_DIGITS = 20  # 2**63 has 19


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice!r} comes twice")
    return table


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def loads(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError (also for bytes that are not UTF-8) with what is wrong."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
