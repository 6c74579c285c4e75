"""Rows of measurement: what one process found about one case, kept as JSON lines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

LIMIT = "limit"  # the fastest of the candidates whose name starts so


@dataclass(frozen=True)
class Row:
    """One case in one process.

    name, m, dtype, variant: the case, title: name as tables show it.  bytes: what must be read and written at least.
    time_us_p20_p50_p80: of every candidate, by name.  machine: what it ran on.
    quality: of candidates that differ in more than time, what the case's table says it is.
    remarks: what to know of a candidate, such as its version, or why it was not timed.
    """

    bench: str
    name: str
    title: str
    m: int
    dtype: str
    variant: str
    bytes: int
    time_us_p20_p50_p80: dict[str, list[float]]
    machine: dict[str, Any]
    run: int = 0
    quality: dict[str, float] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)

    @property
    def case(self) -> tuple[str, str, str, int]:
        return self.title, self.dtype, self.variant, self.m

    def has(self, candidate: str) -> bool:
        return any(name == candidate or (candidate == LIMIT and name.startswith(LIMIT)) for name in self._times)

    @property
    def _times(self) -> dict[str, list[float]]:
        return self.time_us_p20_p50_p80

    def time_us(self, candidate: str) -> float:
        """The candidate's median; "limit" is the smallest of its ways' medians."""
        if candidate == LIMIT:
            return min(times[1] for name, times in self._times.items() if name.startswith(LIMIT))
        return self._times[candidate][1]

    def ratio(self, numerator: str, denominator: str) -> float:
        return self.time_us(numerator) / self.time_us(denominator)


@dataclass(frozen=True)
class Case:
    """The rows of one case, one a run. What it says is the median of what the runs say."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    def _median(self, of: Callable[[Row], float]) -> float:
        return statistics.median(of(row) for row in self.rows)

    def time_us(self, candidate: str) -> float:
        return self._median(lambda row: row.time_us(candidate))

    def ratio(self, numerator: str, denominator: str) -> float:
        """The median of the runs' ratios, each of medians taken in one process."""
        return self._median(lambda row: row.ratio(numerator, denominator))


def cases(rows: Iterable[Row]) -> list[Case]:
    """Rows by case, in the order in which the cases first come."""
    found: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return [Case(tuple(of_one)) for of_one in found.values()]


def to_json(row: Row) -> str:
    record = {key: value for key, value in asdict(row).items() if key != "machine"}
    return json.dumps({**record, **row.machine})


def from_json(line: str) -> Row:
    record = json.loads(line)
    known = {field.name for field in fields(Row)} - {"machine"}
    machine = {key: value for key, value in record.items() if key not in known}
    return Row(**{key: value for key, value in record.items() if key in known}, machine=machine)


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[Row]:
    return [from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The new rows, and in their old place the rows of cases that have no new ones; cases not seen before come last."""
    by_case: dict[tuple[str, str, str, int], list[Row]] = {}
    for row in new:
        by_case.setdefault(row.case, []).append(row)
    kept = list(dict.fromkeys([row.case for row in old] + list(by_case)))
    return [row for case in kept for row in by_case.get(case, [row for row in old if row.case == case])]
