"""report.html: one file without scripts or anything to load, that shows what fl/compare.py has found."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fl.compare import Group, find_runs, group_runs
from fl.errors import UserError
from fl.report import MIB, device_name
from fl.result import scored
from fl.storage import write_atomic
from fl.trace import NEAR, read_trace

COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d", "#525252", "#92400e")
DASHES = ("-", "--", ":")  # for the first, second and third time that a color is used
MARKERS = ("o", "s", "^")  # likewise
FEW = 8  # groups whose names fit into a figure
_TEMPLATE = Path(__file__).parent / "templates" / "report.html"


def write_page(paths: Sequence[Path], out: Path) -> list[Group]:
    """Compare the runs in these directories in one HTML file; returns the groups that its table lists."""
    groups = group_runs(find_runs(paths))
    write_groups(groups, out)
    return groups


def write_groups(groups: Sequence[Group], out: Path) -> None:
    """Compare groups of runs in one HTML file, the first with each other one."""
    try:
        import jinja2
    except ImportError as error:
        raise UserError(f"compare: the page needs jinja2 ({error}), install it with qupedkern's extra 'fl'") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    first = groups[0]
    rows = [
        {**group.row(), "color": COLORS[k % len(COLORS)], "ahead": None if group is first else first.ahead_of(group)}
        for k, group in enumerate(groups)
    ]
    most = max(row["seeds"] for row in rows)
    best = max(row["mean"] for row in rows if row["seeds"] == most)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        rows=rows,
        best=best,
        first=first,
        groups=groups,
        clients=_clients(groups),
        figures=[
            (
                "Accuracy over rounds",
                "Mean over clients and seeds; the band is one sd over the seeds.",
                _over(groups, _rounds),
            ),
            (
                "Accuracy over bytes",
                "The same over what all clients have sent and received so far.",
                _over(groups, _bytes),
            ),
            (
                "Accuracy by client",
                "A dot is a client's mean over the seeds, the bar the mean of all.",
                _by_client(groups),
            ),
            ("Accuracy over model size", "The file that a client ships, mean; finished runs.", _by_size(groups)),
            *_on_centers(groups),
        ],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode())


def _clients(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One line a client of the first group, with its mean accuracy under each group that has as many clients."""
    devices = groups[0].runs[0].description["clients"]
    columns = [g.accuracies.mean(axis=0) if g.accuracies.shape[1] == len(devices) else None for g in groups]
    return [
        {
            "number": number,
            "device": device_name(device["architecture"], device["bits"]),
            "cells": [None if column is None else float(column[number]) for column in columns],
        }
        for number, device in enumerate(devices)
    ]


def _rounds(records: Sequence[dict[str, Any]]) -> list[float]:
    return [record["round"] for record in records]


def _bytes(records: Sequence[dict[str, Any]]) -> list[float]:
    return list(np.cumsum([record["bytes_down"] + record["bytes_up"] for record in records]) / MIB)


def _over(groups: Sequence[Group], along: Callable[[Sequence[dict[str, Any]]], list[float]]) -> str:
    """Mean accuracy of each group as a line over rounds or bytes; runs are cut at the shortest of their group."""

    def draw(axes: Any) -> None:
        for k, group in enumerate(groups):
            length = min(len(run.records) for run in group.runs)
            shown = scored(group.runs[0].records[:length])
            places = np.mean([along(run.records[:length]) for run in group.runs], axis=0)[shown]
            means = 100 * np.array([[run.records[k]["accuracy_mean"] for k in shown] for run in group.runs])
            middle = means.mean(axis=0)
            color, dashes = COLORS[k % len(COLORS)], DASHES[k // len(COLORS) % len(DASHES)]
            if along is _bytes and places[-1] == 0:  # nothing travels: a level to compare with
                axes.axhline(middle[-1], color=color, linewidth=1.2, linestyle="--", label=group.label)
                continue
            marker = "o" if len(shown) == 1 else None
            axes.plot(places, middle, dashes, color=color, linewidth=1.8, marker=marker, label=group.label)
            if len(group.runs) > 1:
                sd = means.std(axis=0, ddof=1)
                axes.fill_between(places, middle - sd, middle + sd, color=color, alpha=0.15, linewidth=0)
        axes.set(xlabel="round" if along is _rounds else "MiB, down and up", ylabel="test accuracy, %", ylim=(0, 101))
        axes.set_xlim(left=0)
        if len(groups) <= FEW:
            axes.legend(loc="lower right", frameon=False, fontsize=9)
        else:
            _legend_below(axes)

    return _svg(draw)


def _on_centers(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """Share of weights on a center over the rounds, of groups whose runs have written it down; no figure where none has."""
    shares: dict[int, dict[int, list[float]]] = {}
    for k, group in enumerate(groups):
        for line in (line for run in group.runs for line in read_trace(run.directory)):
            shares.setdefault(k, {}).setdefault(line["round"], []).append(100 * line["share"])
    if not shares:
        return []

    def draw(axes: Any) -> None:
        for k, seen in shares.items():
            rounds = sorted(seen)
            color, dashes = COLORS[k % len(COLORS)], DASHES[k // len(COLORS) % len(DASHES)]
            means = [np.mean(seen[at]) for at in rounds]
            axes.plot(rounds, means, dashes, color=color, linewidth=1.8, label=groups[k].label)
        axes.set(xlabel="round", ylabel="weights on a center, %", ylim=(0, 101))
        axes.set_xlim(left=0)
        if len(shares) <= FEW:
            axes.legend(loc="upper left", frameon=False, fontsize=9)
        else:
            _legend_below(axes)

    note = f"Quantized weights within {NEAR:.0%} of a gap of their center; mean over the round's clients and the seeds."
    return [("Weights on centers", note, _svg(draw))]


def _legend_below(axes: Any) -> None:
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=7)


def _by_client(groups: Sequence[Group]) -> str:
    def draw(axes: Any) -> None:
        for k, group in enumerate(groups):
            values = np.sort(group.accuracies.mean(axis=0))
            spread = 0.28 * np.sin(2.4 * np.arange(len(values)))  # beside each other, the same on every drawing
            axes.plot(
                k + spread, values, "o", color=COLORS[k % len(COLORS)], markersize=4, alpha=0.55, markeredgewidth=0
            )
            axes.plot([k - 0.36, k + 0.36], [values.mean()] * 2, color="0.15", linewidth=2)
        names = [group.label for group in groups]
        if len(names) > FEW:
            axes.set_xticks(range(len(groups)), names, rotation=55, ha="right", rotation_mode="anchor", fontsize=7)
        else:
            crowded = len(names) > 5 or max(map(len, names)) > 14
            axes.set_xticks(
                range(len(groups)), names, rotation=20 if crowded else 0, ha="right" if crowded else "center"
            )
        axes.set(ylabel="test accuracy, %", xlim=(-0.6, len(groups) - 0.4))
        axes.set_ylim(top=101)

    return _svg(draw)


def _by_size(groups: Sequence[Group]) -> str:
    def draw(axes: Any) -> None:
        for k, group in enumerate(groups):
            row = group.row()
            if row["model"] is not None and row["finished"]:
                color, place = COLORS[k % len(COLORS)], (row["model"], row["mean"])
                marker = MARKERS[k // len(COLORS) % len(MARKERS)]
                size = 8 if len(groups) <= FEW else 5
                axes.errorbar(
                    *place, yerr=row["sd_seeds"], fmt=marker, color=color, markersize=size, capsize=3, label=group.label
                )
                if len(groups) <= FEW:
                    axes.annotate(
                        group.label, place, xytext=(8, 6), textcoords="offset points", fontsize=9, color=color
                    )
        axes.set(xlabel="model file, KiB", ylabel="test accuracy, %")
        axes.margins(x=0.25, y=0.2)
        axes.set_xlim(left=0)
        if len(groups) > FEW:
            _legend_below(axes)

    return _svg(draw)


def _svg(draw: Callable[[Any], None]) -> str:
    """A figure as SVG text with real text in it, to stand in the page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "qupedkern",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "0.4",
        "axes.grid": True,
        "grid.color": "0.9",
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6.4, 3.9), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
