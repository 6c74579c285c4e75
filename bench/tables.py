"""Markdown tables of measured rows, with each target beside the ratio it bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .machine import sentence
from .records import Case, Row, cases
from .targets import SLACK, Target

Key = tuple[str, str, str, int]  # title (with threads), dtype, variant, m


@dataclass(frozen=True)
class Column:
    """The time of `candidate`, or with `over` its ratio to that candidate's; targets by case bound the ratio.

    percent: the ratio is a share, shown in percent.
    """

    title: str
    candidate: str
    over: str | None = None
    targets: Mapping[Key, Target] = field(default_factory=dict)
    percent: bool = False

    def value(self, case: Case) -> float | None:
        if not all(row.has(name) for row in case.rows for name in (self.candidate, self.over) if name is not None):
            return None
        return case.time_us(self.candidate) if self.over is None else case.ratio(self.candidate, self.over)

    def target(self, case: Case) -> Target | None:
        return self.targets.get(case.first.case)

    def cell(self, case: Case) -> str:
        value, target = self.value(case), self.target(case)
        if value is None or value == 0:
            return "-"
        if self.over is None:
            return duration(value)
        text = f"{100 * value:.1f} %" if self.percent else number(value)
        if target is None:
            return text
        bound = f"{'≤' if target.upper else '≥'} {100 * target.bound:g} %" if self.percent else str(target)
        return f"{text} ({bound})" if target.met(value) else f"**{text}** ({bound}, missed)"


@dataclass(frozen=True)
class Table:
    """A title, what the columns mean, and the columns after those that name the case; `tensors` heads the first of these."""

    title: str
    note: str
    columns: Sequence[Column]
    tensors: str = "tensors"

    def render(self, rows: Sequence[Row]) -> str:
        """The table, where it was measured, and how many targets are met. Rows we lose stay."""
        found = cases(rows)
        named = {  # what tells the cases apart; a type or variant that all share is said in the note
            self.tensors: [case.first.title for case in found],
            "variant": [case.first.variant for case in found],
            "type": [case.first.dtype for case in found],
            "m": [str(case.first.m) for case in found],
        }
        names = [head for head, values in named.items() if head not in ("variant", "type") or len(set(values)) > 1]
        lines = [f"### {self.title}", "", f"{sentence(rows[0].machine)} {_runs(found)}", self.note, ""]
        lines.append("| " + " | ".join([*names, *(column.title for column in self.columns)]) + " |")
        lines.append("| --- " * (len(names) + len(self.columns)) + "|")
        for i, case in enumerate(found):
            cells = [*(named[name][i] for name in names), *(column.cell(case) for column in self.columns)]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", self._verdict(found)])

    def _verdict(self, found: Sequence[Case]) -> str:
        judged = [(column.target(case), column.value(case)) for case in found for column in self.columns]
        met = [target.met(value) for target, value in judged if target is not None and value is not None]
        if not met:
            return "No targets were set for these rows."
        return f"{sum(met)} of {len(met)} targets met (the median within {100 * SLACK:.0f} % of it); those missed are bold."


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
