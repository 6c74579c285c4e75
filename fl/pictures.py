"""Pictures beside report.plot: accuracy against what travelled, and who holds which classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fl.core import Client
from fl.data import class_counts
from fl.report import MIB, name_of
from fl.result import RunResult, scored


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of one panel, without a display and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def plot_bytes(results: Sequence[RunResult], path: Path) -> None:
    """Write a picture of the clients' mean test accuracy over the bytes sent so far, up and down together.

    Results in which nothing travelled are a level line at what their clients ship.
    """
    figure, axes = _figure(7, 4.4)
    for position, result in enumerate(results):
        sent = np.cumsum([record["bytes_up"] + record["bytes_down"] for record in result.records]) / MIB
        shown = scored(result.records)
        accuracy = [100 * result.records[k]["accuracy_mean"] for k in shown]
        style: dict[str, Any] = {"color": f"C{position}", "linewidth": 1.6, "label": name_of(result)}
        if sent[-1] > 0:
            axes.plot(sent[shown], accuracy, **style)
        else:
            axes.axhline(100 * result.mean_accuracy, linestyle="--", **style)
    axes.set(xlabel="sent, up and down together, MiB", ylabel="mean test accuracy of the clients, %", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", framealpha=0.9, edgecolor="none")
    figure.savefig(path)


def plot_classes(clients: Sequence[Client], num_classes: int, path: Path) -> None:
    """Write a picture of the clients x classes table: a disc for each, its area in proportion to the training images."""
    counts = class_counts([client.data for client in clients], num_classes)
    figure, axes = _figure(2 + 0.22 * len(clients), 1.2 + 0.22 * num_classes)
    client, label = np.nonzero(counts)
    axes.scatter(client, label, s=90 * counts[client, label] / counts.max(), color="C0", linewidths=0)
    axes.set(xlabel="client", ylabel="class", xlim=(-0.7, len(clients) - 0.3), ylim=(-0.7, num_classes - 0.3))
    axes.set_title(f"Training images; the largest disc is {counts.max()}", fontsize=10, loc="left")
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    figure.savefig(path)
