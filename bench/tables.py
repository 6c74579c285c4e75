"""Markdown tables of measured rows, with each target beside the ratio it bounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .machine import sentence
from .records import Case, Row, cases
from .targets import Target

Key = tuple[str, str, str, int]  # title (with threads), dtype, variant, m


@dataclass(frozen=True)
class Column:
    """The time of `candidate`, or with `over` its ratio to that candidate's; targets by case bound it, times in microseconds.

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

    def cell(self, line: Sequence[Case]) -> str:
        """Of the cases of one line, by m: "1.05 / **2.10** / 3.00 (≤ 1.1 / 1.6 / 3.5)", in bold what misses its target."""
        values, targets = [self.value(case) for case in line], [self.target(case) for case in line]
        shown = [self.shown(value, target) for value, target in zip(values, targets, strict=True)]
        if not any(targets) or all(value is None for value in values):
            return " / ".join(shown) if set(shown) != {"-"} else "-"
        bounds = [self._bound(target) for target in targets]
        sign = next("≤" if target.upper else "≥" for target in targets if target is not None)
        return f"{' / '.join(shown)} ({sign} {bounds[0] if len(set(bounds)) == 1 else ' / '.join(bounds)})"

    def shown(self, value: float | None, target: Target | None) -> str:
        """One value as text; a dash for what was not timed or took no time."""
        if not value:
            return "-"
        text = self._text(value)
        return text if target is None or target.met(value) else f"**{text}**"

    def _text(self, value: float) -> str:
        if self.percent:
            return f"{100 * value:.1f} %"
        return duration(value) if self.over is None else number(value)

    def _bound(self, target: Target | None) -> str:
        if target is None:
            return "-"
        if self.percent:
            return f"{100 * target.bound:g} %"
        return duration(target.bound) if self.over is None else f"{target.bound:g}"


class Once(Column):
    """A column of what m may not change: one number for a line in which all are the same."""

    def cell(self, line: Sequence[Case]) -> str:
        values = {self.value(case) for case in line}
        return super().cell(line[:1] if len(values) == 1 else line)


@dataclass(frozen=True)
class Table:
    """A title, what the columns mean, and the columns after those that name the case, whose heads are tensors and variant.

    variant: "" where titles say enough.  level: what a row's m counts, where it is not centers.  of: the rows it shows,
    where it does not show all.
    """

    title: str
    note: str
    columns: Sequence[Column]
    tensors: str = "tensors"
    variant: str = "variant"
    level: str = "m"
    of: Callable[[Row], bool] = lambda row: True

    def render(self, rows: Sequence[Row]) -> str:
        """The table, where it was measured, and how many targets are met; "" without rows. Rows we lose stay."""
        rows = [row for row in rows if self.of(row)]
        if not rows:
            return ""
        found = cases(rows)
        lines_of_cases: dict[tuple[str, str, str], list[Case]] = {}
        for case in found:
            lines_of_cases.setdefault((case.first.title, case.first.variant, case.first.dtype), []).append(case)
        # what tells the lines apart; a variant or type that all share is said in the note
        heads = (self.tensors, self.variant, "type")
        kept = [k for k in range(3) if k == 0 or len({names[k] for names in lines_of_cases}) > 1]
        variants = [names[1] for names in lines_of_cases]
        shared = (
            "" if 1 in kept or not variants[0] or not self.variant else f" {self.variant}: {variants[0]}, in all rows."
        )
        lines = [
            f"### {self.title}",
            "",
            f"{sentence(rows[0].machine)} {_runs(found, self.columns[0].candidate)}{_load(rows)}",
            f"{self.note} {_levels(self.level, found)}{shared}",
            "",
        ]
        lines.append("| " + " | ".join([*(heads[k] for k in kept), *(column.title for column in self.columns)]) + " |")
        lines.append("| --- " * (len(kept) + len(self.columns)) + "|")
        for names, line in lines_of_cases.items():
            cells = [*(names[k] for k in kept), *(column.cell(line) for column in self.columns)]
            lines.append("| " + " | ".join(cells) + " |")
        remarks = self._remarks(rows)
        return "\n".join([*lines, "", *([f"{remarks}\n"] if remarks else []), self._verdict(found)])

    def _remarks(self, rows: Sequence[Row]) -> str:
        """What is to be known of the candidates of its columns, each once."""
        shown = {name for column in self.columns for name in (column.candidate, column.over)}
        said = dict.fromkeys(
            f"{name}: {remark}." for row in rows for name, remark in row.remarks.items() if name in shown
        )
        return " ".join(said)

    def _verdict(self, found: Sequence[Case]) -> str:
        pairs = ((column.target(case), column.value(case)) for case in found for column in self.columns)
        judged = [(target, value) for target, value in pairs if target is not None and value is not None]
        if not judged:
            return "No targets were set for these rows."
        met, slack = sum(target.met(value) for target, value in judged), max(target.slack for target, _ in judged)
        how = f"the median within {100 * slack:.0f} % of it" if slack else "by the median"
        return f"{met} of {len(judged)} targets met ({how}); those missed are bold."


def _runs(found: Sequence[Case], candidate: str) -> str:
    fewest = min(len(case.rows) for case in found)
    times = [row.time_us_p20_p50_p80.get(candidate) for case in found for row in case.rows]
    spread = statistics.median([(one[2] - one[0]) / one[1] for one in times if one and one[1]] or [0.0])
    said = f"{fewest} separate processes" if fewest > 1 else "one process, indicative only"
    return (
        f"Medians of {said}; samples interleaved, {candidate} spreads {100 * spread:.0f} % (20th to 80th percentile)."
    )


def _load(rows: Sequence[Row]) -> str:
    """A warning where more ran than the machine has cores, with or without us: then not even ratios can be believed."""
    loads, cores = [float(row.machine.get("load", 0)) for row in rows], int(rows[0].machine["cores"])
    return f" **On a busy machine, load average up to {max(loads)}.**" if max(loads) > cores + 0.5 else ""


def _levels(level: str, found: Sequence[Case]) -> str:
    """What the numbers between the slashes belong to."""
    levels = list(dict.fromkeys(case.first.m for case in found))
    return f"{level} = {' / '.join(map(str, levels))}{', in this order in each cell' if len(levels) > 1 else ''}."


def number(value: float) -> str:
    """Three digits, without those a ratio of times cannot carry."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def duration(time_us: float) -> str:
    for unit, size in (("µs", 1), ("ms", 1e3)):
        if time_us < 1000 * size:
            return f"{number(time_us / size)} {unit}"
    return f"{number(time_us / 1e6)} s"
