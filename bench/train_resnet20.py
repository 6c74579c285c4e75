"""A training step of ResNet-20 on CIFAR shapes, by method: how long, and where the time goes. Random images: only time counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import qupedkern as qk
from fl import models
from qupedkern.optim.quped import EVALUATIONS as EVALUATIONS_OF

from . import machine
from .phases import EVALUATIONS, PHASES, Watched
from .records import Row, cases
from .tables import Column, Table
from .targets import at_most
from .timing import percentiles

PLAIN = "plain SGD"
METHODS = (PLAIN, "straight_through", *EVALUATIONS_OF)
NETWORKS = {"ResNet-20": ("resnet20", 128), "ResNet-8": ("resnet8", 8)}  # architecture and batch
NAMES, QUICK, LEVELS = ("ResNet-20",), ("ResNet-8",), (4,)
TOTAL_STEPS = 1_000_000  # far more than are taken: no step is after the freeze
BESIDE = "all but evaluations"


def _optimizer(method: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, foreach=True)
    if method == PLAIN:
        return sgd
    if method == "straight_through":
        return qk.StraightThrough(model, sgd, total_steps=TOTAL_STEPS)
    return qk.QuPeD(model, sgd, variant=method, total_steps=TOTAL_STEPS)


def _watched(name: str, method: str, m: int) -> Watched:
    architecture, batch = NETWORKS[name]
    model = models.build(architecture, (3, 32, 32), 10, seed=0).train()
    if method != PLAIN:
        qk.quantize_(model, levels=m)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(batch, 3, 32, 32, generator=generator), torch.randint(10, (batch,), generator=generator)
    return Watched(_optimizer(method, model), lambda: F.cross_entropy(model(x), y))


def measure(name: str, m: int, *, threads: int, rounds: int) -> list[Row]:
    """One row a method; a step of each in turns."""
    torch.set_num_threads(threads)
    watched = {method: _watched(name, method, m) for method in METHODS}
    for one in watched.values():
        one.step()
        one.step()
    steps: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        for method, one in watched.items():
            steps[method].append(one.step())

    def times(method: str) -> dict[str, list[float]]:
        found: dict[str, Callable[[dict[str, float]], float]] = {
            "step": lambda step: sum(step.values()),
            BESIDE: lambda step: sum(us for phase, us in step.items() if phase not in EVALUATIONS),
            **{phase: lambda step, phase=phase: step[phase] for phase in PHASES},  # type: ignore[misc]
        }
        return {key: percentiles([of(step) for step in steps[method]]).rounded() for key, of in found.items()}

    plain = {PLAIN: times(PLAIN)["step"]}  # in every row: what its step is compared with
    return [
        Row(
            bench="train-resnet20",
            name=name,
            title=f"{name}, batch {NETWORKS[name][1]}, {threads} thread{'s' if threads > 1 else ''}",
            m=m,
            dtype="float32",
            variant=method.replace("_", " "),
            bytes=0,
            time_us_p20_p50_p80={**times(method), **plain},
            machine=machine.description(),
        )
        for method in METHODS
    ]


def rows(names: Sequence[str], levels: Sequence[int], *, rounds: int, threads: int | None, compiled: bool) -> list[Row]:
    """All rows of one process."""
    many = threads or torch.get_num_threads()
    return [row for name in names for m in levels for row in measure(name, m, threads=many, rounds=rounds)]


_TITLES = [f"ResNet-20, batch 128, {threads}" for threads in ("1 thread", "2 threads")]
_STEPS = {"hard": 2.1, "alternating": 3.1, "simultaneous": 2.1}

TABLES = [
    Table(
        "A training step of ResNet-20",
        "272k parameters, 20 quantized weights, CIFAR shapes, float32, SGD with momentum inside every method, before the "
        "freeze; a step of each method in turns. evaluations: forward and backward passes of the network. In brackets the targets.",
        [
            Column("step", "step"),
            Column(
                "step / plain SGD",
                "step",
                PLAIN,
                {(t, "float32", method, 4): at_most(bound)[0] for t in _TITLES for method, bound in _STEPS.items()},
            ),
            *(Column(phase, phase) for phase in PHASES),
            Column(
                "all but evaluations / step",
                BESIDE,
                "step",
                {(t, "float32", method, 4): at_most(0.03)[0] for t in _TITLES for method in _STEPS},
                percent=True,
            ),
        ],
        tensors="network",
        variant="method",
    )
]


def picture(found: Sequence[Row], path: Path) -> None:
    """Stacked bars by phase: the whole step, and beside it enlarged all but the evaluations. path: .png or .svg."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10.5, 3.8), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)  # no display, and no global state of pyplot
        whole, beside = figure.subplots(1, 2, sharey=True, width_ratios=[1.7, 1])
        _plot(whole, found, PHASES)
        _plot(beside, found, [phase for phase in PHASES if phase not in EVALUATIONS])
        whole.set_title(f"A step of {found[0].title}, ms (× plain SGD)", fontsize=10, loc="left")
        beside.set_title("Of it, all but the evaluations, ms (% of the step)", fontsize=10, loc="left")
        figure.legend(
            *whole.get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES), frameon=False, fontsize=9
        )
        figure.savefig(path)


def _plot(axes: Any, found: Sequence[Row], phases: Sequence[str]) -> None:
    of_methods = cases(found)
    colors = {**dict(zip(EVALUATIONS, ("0.45", "0.75"), strict=True)), "rest": "C3"}
    colors |= {phase: f"C{i}" for i, phase in enumerate(phase for phase in PHASES if phase not in colors)}
    ends = [0.0] * len(of_methods)
    for phase in phases:
        widths = [case.time_us(phase) / 1000 for case in of_methods]
        axes.barh(range(len(of_methods)), widths, left=ends, height=0.6, color=colors[phase], label=phase)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    full = phases == PHASES
    for place, (case, end) in enumerate(zip(of_methods, ends, strict=True)):
        label = f"{case.ratio('step', PLAIN):.2f} ×" if full else f"{100 * case.ratio(BESIDE, 'step'):.1f} %"
        axes.annotate(label, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(of_methods)), [case.first.variant for case in of_methods])
    axes.invert_yaxis() if full else None
    axes.set_xlim(0, 1.18 * max(ends))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
