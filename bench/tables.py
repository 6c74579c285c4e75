"""Markdown tables of measured rows, with each target beside the ratio it bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .machine import sentence
from .records import Case, Row, cases
from .targets import SLACK, Target

Key = tuple[str, str, str, int]  # name, dtype, variant, m


@dataclass(frozen=True)
class Column:
    """The time of `candidate`, or with `over` its ratio to that candidate's; targets by case bound the ratio."""

    title: str
    candidate: str
    over: str | None = None
    targets: Mapping[Key, Target] = field(default_factory=dict)

    def value(self, case: Case) -> float | None:
        if not all(row.has(name) for row in case.rows for name in (self.candidate, self.over) if name is not None):
            return None
        return case.time_us(self.candidate) if self.over is None else case.ratio(self.candidate, self.over)

    def target(self, case: Case) -> Target | None:
        return self.targets.get(case.first.case)

    def cell(self, case: Case) -> str:
        value, target = self.value(case), self.target(case)
        if value is None:
            return "-"
        if self.over is None:
            return duration(value)
        if target is None:
            return number(value)
        return f"{number(value)} ({target})" if target.met(value) else f"**{number(value)}** ({target}, missed)"


@dataclass(frozen=True)
class Table:
    """A title, what the columns mean, and the columns."""

    title: str
    note: str
    columns: Sequence[Column]

    def render(self, rows: Sequence[Row]) -> str:
        """The table, where it was measured, and how many targets are met. Rows we lose stay."""
        found = cases(rows)
        variants = any(case.first.variant for case in found)
        head = ["tensors", *(["variant"] if variants else []), "type", "m", *(column.title for column in self.columns)]
        lines = [f"### {self.title}", "", f"{sentence(rows[0].machine)} {_runs(found)}", self.note, ""]
        lines += ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        for case in found:
            row = case.first
            name = [row.title, *([row.variant] if variants else []), row.dtype, str(row.m)]
            lines.append("| " + " | ".join([*name, *(column.cell(case) for column in self.columns)]) + " |")
        return "\n".join([*lines, "", self._verdict(found)])

    def _verdict(self, found: Sequence[Case]) -> str:
        met, missed = 0, []
        for case in found:
            for column in self.columns:
                value, target = column.value(case), column.target(case)
                if value is None or target is None:
                    continue
                if target.met(value):
                    met += 1
                else:
                    row = case.first
                    variant = f"{row.variant}, " if row.variant else ""
                    missed.append(f"{row.title}, {variant}m = {row.m}: {column.title} {number(value)} ({target})")
        if not met and not missed:
            return "No targets were set for these rows."
        said = f"{met} of {met + len(missed)} targets met (within {100 * SLACK:.0f} %)."
        return said + (" Missed: " + "; ".join(missed) + "." if missed else "")


def _runs(found: Sequence[Case]) -> str:
    fewest = min(len(case.rows) for case in found)
    if fewest == 1:
        return "One process: indicative only."
    return f"Medians of {fewest} separate processes, in each of them interleaved samples."


def number(value: float) -> str:
    """Three digits, without those a ratio of times cannot carry."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def duration(time_us: float) -> str:
    return f"{number(time_us)} µs" if time_us < 1000 else f"{number(time_us / 1000)} ms"
