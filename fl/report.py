"""What a run shows: tables for the terminal, and a picture. The numbers come from RunResult and its records.

A record is one line of records.jsonl, one a round; round 0 is the state before training:
  algorithm          its name
  round              rounds done
  drawn              the clients that took part, ascending;  failed: those of them that lost this round's work
  late               those of them whose messages came too late;  aggregated: whether enough came for the server to step
  scored             whether clients were scored after this round; where not, accuracies are those of the last scoring
  accuracy           every client's test accuracy, 0..1, of the model it would ship now (hard, packed weights)
  accuracy_mean      their mean;  accuracy_worst: their minimum
  validation         the same on the clients' validation parts;  validation_mean: their mean
  loss               mean training loss of the drawn clients' steps; null before training
  evaluations        gradient evaluations by client number, as text
  bytes_down         sent to the drawn clients;  bytes_up: received from them, late messages included
  bytes_by_client    [down, up] by client number, as text
  bytes_down_float32, bytes_up_float32   what these would be with every float in 32 bits
  stacks             with the engine "stacked": the clients that were trained together;  alone: why each other one was not
  seconds            wall-clock time of the round; the only number that a repeated run does not repeat
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fl.core import Bits, Client
from fl.data import class_counts
from fl.result import RunResult, scored

NAMES = {  # how tables write them; others as they are
    "ditto": "Ditto",
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "fml": "FML",
    "per_fedavg": "Per-FedAvg",
    "pfedme": "pFedMe",
    "quped": "QuPeD",
    "qupel": "QuPeL",
}
MIB = 2**20
FEW = 4  # algorithms whose names and numbers fit beside one another under bars


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def device_name(architecture: str, bits: Bits) -> str:
    """How tables and pictures write a client's device."""
    return f"{architecture} {bits}{'-bit' if isinstance(bits, int) else ''}"


def _classes(classes: Sequence[int]) -> str:
    return " ".join(map(str, classes))


def _table(title: str, columns: Sequence[str], *, left: int = 0) -> Any:
    """A rich table; the first `left` columns are text, the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        collapse_padding=True,
        pad_edge=False,
    )
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position < left else "right", no_wrap=True)
    return table


def _print(table: Any, console: Any) -> None:
    (console or terminal()).print(table)


def terminal() -> Any:
    """A rich console as wide as the terminal; 200 columns where the output goes to a file, so that nothing is cut."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=200)


MANY_CLASSES = 20  # more do not fit a line


def print_classes(clients: Sequence[Client], num_classes: int, console: Any = None) -> None:
    """Print the clients x classes table: training images, and the sizes of the other two parts.

    Of more than 20 classes: how many each client holds, and the share of its images in the largest of them.
    """
    counts = class_counts([client.data for client in clients], num_classes)
    many = num_classes > MANY_CLASSES
    columns = ["classes", "largest %"] if many else [str(label) for label in range(num_classes)]
    table = _table(
        "Training images by client and class", ["client", "device", *columns, "train", "val", "test"], left=2
    )
    for client, row in zip(clients, counts, strict=True):
        cells = [str(count) if count else "·" for count in row]
        if many:
            cells = [str((row > 0).sum()), _percent(row.max() / row.sum())]
        sizes = [str(len(part)) for part in (client.data.train, client.data.val, client.data.test)]
        table.add_row(str(client.id), device_name(client.architecture, client.bits), *cells, *sizes)
    _print(table, console)


def print_clients(results: Sequence[RunResult], console: Any = None) -> None:
    """Print one line a client: its device and classes, and each algorithm's test accuracy from the shipped file.

    Device, evaluations and file size are the first result's.
    """
    first = results[0]
    columns = ["client", "device", "classes", "train", "test", "evals", "KiB"]
    table = _table(
        f"Test accuracy by client, % (device, gradient evaluations and file: {name_of(first)})",
        [*columns, *(f"{name_of(result)} %" for result in results)],
        left=3,
    )
    for position, row in enumerate(first.clients):
        table.add_row(
            str(row.client),
            device_name(row.architecture, row.bits),
            _classes(row.classes),
            str(row.train_samples),
            str(row.test_samples),
            f"{row.evaluations:,}",
            f"{row.model_bytes / 1024:.1f}",
            *(_percent(result.clients[position].accuracy) for result in results),
        )
    _print(table, console)


def print_comparison(results: Sequence[RunResult], console: Any = None) -> None:
    """Print one line an algorithm: accuracy, what it took, and the paired difference of the first to each other.

    The difference is over the clients, with its standard error: std of the differences / sqrt(clients).
    shared: the global model's accuracy on all clients' test images together.
    """
    columns = ["algorithm", "mean %", "worst %", f"{name_of(results[0])} ahead (se)", "shared %", "evaluations"]
    columns += ["down MiB", "up MiB", "float32 MiB", "model KiB", "s"]
    table = _table("The same budget for each", columns, left=1)
    for result in results:
        table.add_row(
            name_of(result),
            _percent(result.mean_accuracy),
            _percent(result.worst_accuracy),
            _difference(results[0], result),
            "" if result.shared_accuracy is None else _percent(result.shared_accuracy),
            f"{result.evaluations:,}",
            f"{result.total('bytes_down') / MIB:.1f}",
            f"{result.total('bytes_up') / MIB:.1f}",
            f"{(result.total('bytes_down_float32') + result.total('bytes_up_float32')) / MIB:.1f}",
            f"{np.mean([row.model_bytes for row in result.clients]) / 1024:.1f}",
            f"{result.seconds:.0f}",
        )
    _print(table, console)


def name_of(result: RunResult) -> str:
    """How tables and pictures write the result's algorithm."""
    return NAMES.get(result.algorithm, result.algorithm)


def _difference(first: RunResult, other: RunResult) -> str:
    """Mean over the clients of first's accuracy minus other's, in points, with its standard error."""
    if other is first:
        return ""
    gaps = 100 * np.array([a.accuracy - b.accuracy for a, b in zip(first.clients, other.clients, strict=True)])
    if len(gaps) < 2:
        return f"{gaps.mean():+.1f}"
    return f"{gaps.mean():+.1f} ({gaps.std(ddof=1) / np.sqrt(len(gaps)):.1f})"


def plot(results: Sequence[RunResult], path: Path) -> None:
    """Write a picture: test accuracy over the rounds, the bytes each algorithm moved, and those its models take.

    path: its suffix decides the format; .png and .svg work everywhere.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10.5, 4.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)  # no display, and no global state of pyplot
        axes = figure.subplot_mosaic([["accuracy", "wire"], ["accuracy", "model"]], width_ratios=[1.7, 1])
        _plot_accuracy(axes["accuracy"], results)
        _plot_wire(axes["wire"], results)
        _plot_models(axes["model"], results)
        figure.savefig(path)


def _plot_accuracy(axes: Any, results: Sequence[RunResult]) -> None:
    from matplotlib.ticker import MaxNLocator

    for position, result in enumerate(results):
        records = [result.records[k] for k in scored(result.records)]
        rounds = [record["round"] for record in records]
        mean = [100 * record["accuracy_mean"] for record in records]
        worst = [100 * record["accuracy_worst"] for record in records]
        label = f"{name_of(result)}: {_percent(result.mean_accuracy)} % at the end"
        color = f"C{position}"
        axes.plot(rounds, mean, color=color, linewidth=1.8, label=label)
        axes.plot(rounds, worst, color=color, linewidth=0.8, linestyle=":")
        axes.plot(rounds[-1], 100 * result.mean_accuracy, "o", color=color, markersize=5, clip_on=False)
    axes.set(
        xlabel="round", ylabel="test accuracy, %", ylim=(0, 101), xlim=(0, max(len(r.records) for r in results) - 1)
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Clients' accuracy (solid: mean, dotted: worst, dot: shipped files)", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", framealpha=0.9, edgecolor="none")


def _plot_wire(axes: Any, results: Sequence[RunResult]) -> None:
    down = [result.total("bytes_down") / MIB for result in results]
    up = [result.total("bytes_up") / MIB for result in results]
    place = np.arange(len(results))
    for offset, values, label, color in ((-0.2, down, "down", "0.45"), (0.2, up, "up", "0.75")):
        bars = axes.bar(place + offset, values, width=0.4, label=label, color=color)
        if len(results) <= FEW:
            axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=2, fontsize=9)
    _name_bars(axes, results, max(down + up))
    axes.set_title("On the wire, whole run, MiB", fontsize=10, loc="left")
    axes.legend(loc="upper center", ncols=2, frameon=False, fontsize=9)


def _plot_models(axes: Any, results: Sequence[RunResult]) -> None:
    sizes = [float(np.mean([row.model_bytes for row in result.clients])) / 1024 for result in results]
    bars = axes.bar(range(len(results)), sizes, width=0.5, color=[f"C{position}" for position in range(len(results))])
    axes.bar_label(bars, [f"{size:.1f}" for size in sizes], padding=2, fontsize=9)
    _name_bars(axes, results, max(sizes))
    axes.set_title("A client's model file, mean, KiB", fontsize=10, loc="left")


def _name_bars(axes: Any, results: Sequence[RunResult], highest: float) -> None:
    names = [name_of(result) for result in results]
    turned = {} if len(results) <= FEW else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(results)), names, **turned)
    axes.set_ylim(0, 1.35 * highest if highest > 0 else 1.0)
