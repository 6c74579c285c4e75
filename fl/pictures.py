"""Pictures beside report.plot: accuracy against what travelled and by client, who holds which classes, weights on centers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fl.core import Client
from fl.data import class_counts
from fl.report import MIB, name_of
from fl.result import RunResult, scored
from fl.storage import Json
from fl.trace import NEAR, read_trace

DEVICES = 3  # whose centers are drawn beside one another


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of panels, without a display and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=rows * columns == 1)


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


def plot_clients(results: Sequence[RunResult], path: Path) -> None:
    """Write a picture of each client's test accuracy, from the file it ships, under each algorithm."""
    count = len(results[0].clients)
    figure, axes = _figure(min(14.0, 3 + 0.3 * count), 4.0)
    width = 0.7 / len(results)
    for position, result in enumerate(results):
        places = [row.client + width * (position - (len(results) - 1) / 2) for row in result.clients]
        values = [100 * row.accuracy for row in result.clients]
        label = f"{name_of(result)}: mean {100 * result.mean_accuracy:.1f}, worst {100 * result.worst_accuracy:.1f} %"
        axes.plot(places, values, "o", color=f"C{position}", markersize=5 if count <= 60 else 3, label=label)
    for place in range(count - 1):
        axes.axvline(place + 0.5, color="0.92", linewidth=0.8, zorder=0)
    axes.set(xlabel="client", ylabel="test accuracy of the shipped file, %", xlim=(-0.5, count - 0.5))
    axes.set_ylim(top=101)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", alpha=0.3)
    axes.figure.legend(loc="outside lower center", ncols=min(3, len(results)), frameon=False, fontsize=9)
    figure.savefig(path)


def plot_centers(results: Sequence[RunResult], path: Path) -> bool:
    """Write a picture of how weights come to lie on centers, a row of panels for each algorithm that has quantized clients.

    Left the share of weights on a center (trace.share_on_centers) by device, mean over the clients looked at in a round; then
    the centers of the largest layer of the first client of a device over the rounds. False: there is nothing to draw.
    """
    traces = [(result, lines) for result in results if (lines := read_trace(result.directory))]
    if not traces:
        return False
    shown = [_watched(lines) for _, lines in traces]
    columns = 1 + max(map(len, shown))
    figure, panels = _figure(3.6 * columns, 2.9 * len(traces), len(traces), columns)
    panels = np.reshape(panels, (len(traces), columns))
    for row, (result, lines), watched in zip(panels, traces, shown, strict=True):
        _plot_shares(row[0], name_of(result), lines, len(result.records) - 1)
        for axes, (device, seen) in zip(row[1:], watched.items(), strict=False):
            _plot_one_layer(axes, device, seen, len(result.records) - 1)
        for axes in row[1 + len(watched) :]:
            axes.set_axis_off()
    figure.savefig(path)
    return True


def _watched(lines: Sequence[Json]) -> dict[str, list[Json]]:
    """By device the lines with centers, of the first few devices that have some."""
    seen: dict[str, list[Json]] = {}
    for line in lines:
        if "centers" in line:
            seen.setdefault(line["device"], []).append(line)
    return dict(sorted(seen.items())[:DEVICES])


def _plot_shares(axes: Any, name: str, lines: Sequence[Json], rounds: int) -> None:
    for position, device in enumerate(sorted({line["device"] for line in lines})):
        shares: dict[int, list[float]] = {}
        for line in lines:
            if line["device"] == device:
                shares.setdefault(line["round"], []).append(100 * line["share"])
        means = [float(np.mean(values)) for values in shares.values()]
        style = {"color": f"C{position}", "linewidth": 1.4, "markersize": 2.5, "label": device}
        axes.plot(list(shares), means, "o-", **style)
    axes.set(
        xlabel="round",
        ylabel=f"weights within {NEAR:.0%} of a gap\nof their center, %",
        ylim=(0, 103),
        xlim=(0, rounds),
    )
    axes.set_title(name, fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.9, edgecolor="none", fontsize=8)


def _plot_one_layer(axes: Any, device: str, lines: Sequence[Json], rounds: int) -> None:
    layer = lines[0]["largest"]
    axes.plot(
        [line["round"] for line in lines], [line["centers"][layer] for line in lines], "o-", linewidth=1.2, markersize=2
    )
    axes.set(xlabel="round", xlim=(0, rounds))
    axes.set_title(f"centers of {layer}, client {lines[0]['client']} ({device})", fontsize=9, loc="left")
    axes.grid(alpha=0.3)
