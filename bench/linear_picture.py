"""The picture of `bench linear`: how many times as fast as torch's own layer, by batch and bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .records import Case, Row, cases

RIVALS = {"float32": "torch float32", "bfloat16": "torch bfloat16"}  # input type: torch's layer of that type
_WIDTH = 0.2  # of a bar; four fill 0.8 of the distance between two batches


def picture(found: Sequence[Row], path: Path) -> None:
    """Bars of the first layer in the records, a panel for each type of input. path: .png or .svg."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title = found[0].title
    panels = {
        dtype: [case for case in cases(found) if (case.first.title, case.first.dtype) == (title, dtype)]
        for dtype in RIVALS
    }
    panels = {dtype: of_type for dtype, of_type in panels.items() if of_type}
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.2 * len(panels), 3.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)  # no display, and no global state of pyplot
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for panel, (dtype, of_type) in zip(axes, panels.items(), strict=True):
            _plot(panel, of_type, RIVALS[dtype])
            panel.set_title(f"{title}, {dtype} input, against {RIVALS[dtype]}", fontsize=10, loc="left")
        axes[0].set_ylabel("times as fast as torch\n(native call)")
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9
        )
        figure.savefig(path)


def _plot(axes: Any, of_type: Sequence[Case], rival: str) -> None:
    batches = list(dict.fromkeys(case.first.variant for case in of_type))
    levels = sorted({case.first.m for case in of_type})
    for place, bits in enumerate(levels):
        shown = [
            case for case in of_type if case.first.m == bits and case.first.has(rival) and case.first.has("native")
        ]
        at = [batches.index(case.first.variant) + (place - (len(levels) - 1) / 2) * _WIDTH for case in shown]
        ratios = [case.ratio(rival, "native") for case in shown]
        heights = [ratio - 1 for ratio in ratios]  # bars grow from 1, as fast as torch; slower ones hang below it
        bars = axes.bar(at, heights, bottom=1, width=0.9 * _WIDTH, color=f"C{place}", label=f"{bits} bit")
        axes.bar_label(bars, [f"{ratio:.2g}" for ratio in ratios], fontsize=8, padding=1)
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xticks(range(len(batches)), batches)
