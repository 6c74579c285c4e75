"""The rows of a set as one picture: what each line reached, and how far it is from the reference, client by client."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fl.paper.rows import Json
from fl.paper.study import COLUMNS, Study

STYLES = {"rounds": ("C0", "equal rounds"), "evaluations": ("C1", "equal gradient evaluations")}


def draw(study: Study, rows: Sequence[Json], path: Path) -> None:
    """Write the picture; the suffix decides the format. Lines of which nothing has run are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ran = [row for row in rows if row["seeds"]]
    first = {row["method"]: row for row in reversed(ran)}  # the first column's where there are both
    order = sorted(first, key=lambda name: first[name]["ahead"] or 0.0)  # paired: lines may differ in their seeds
    places = {name: place for place, name in enumerate(order)}
    figure = Figure(figsize=(10, 1.3 + 0.28 * len(order)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, ahead = figure.subplots(1, 2, sharey=True)
    shown = [column for column in COLUMNS if any(row["column"] == column for row in ran)]
    for number, column in enumerate(shown):
        mine = [row for row in ran if row["column"] == column]
        shift = 0.28 * (number - 0.5 * (len(shown) - 1))
        _draw_column(accuracy, ahead, mine, places, *STYLES[column], shift)
    accuracy.set_yticks(range(len(order)), [_name(study, first[name]) for name in order], fontsize=8.5)
    accuracy.set_ylim(-0.6, len(order) - 0.4)
    accuracy.set_xlabel("test accuracy, %\nsmall dots: single seeds")
    reference = _name(study, first[study.paper.reference]) if study.paper.reference in first else study.paper.reference
    ahead.axvline(0, color="0.3", linewidth=0.9)
    ahead.set_xlabel(f"points ahead of {reference}\nbar: ± standard error")
    for axes in (accuracy, ahead):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if len(shown) > 1:
        accuracy.legend(loc="upper left", frameon=False, fontsize=8.5)
    figure.suptitle(study.paper.title, x=0.01, ha="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_column(
    accuracy: Any, ahead: Any, rows: Sequence[Json], places: dict[str, int], color: str, label: str, shift: float
) -> None:
    heights = [places[row["method"]] + shift for row in rows]
    for row, height in zip(rows, heights, strict=True):
        seeds = np.mean(row["accuracies"], axis=1)
        accuracy.plot(seeds, [height] * len(seeds), ".", color=color, markersize=4, alpha=0.45, markeredgewidth=0)
    accuracy.plot([row["accuracy"] for row in rows], heights, "o", color=color, markersize=5.5, label=label)
    paired = [(row, height) for row, height in zip(rows, heights, strict=True) if row["ahead"] is not None]
    for row, height in paired:
        ahead.errorbar(row["ahead"], height, xerr=row["ahead_se"], fmt="o", color=color, markersize=4.5, capsize=2.5)


def _name(study: Study, row: Json) -> str:
    return next(
        method.label_of(steps) for method in study.methods for line, steps in method.lines if line == row["method"]
    )
