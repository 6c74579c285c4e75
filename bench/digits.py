"""Algorithm 1 on handwritten digits: test accuracy of each method and bit width at equal gradient evaluations.

Per seed: a stratified 60/10/30 split; a float network is trained (the warm start); then every method gets the same number
of further gradient evaluations, EVALUATIONS, from that same network, with every layer quantized. Settings were chosen on
the validation part; the test part is only read for the table.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qupedkern as qk
from fl import data, models
from fl.seeds import torch_generator
from qupedkern.optim.quped import EVALUATIONS as EVALUATIONS_OF

ARCHITECTURES = ("mlp", "cnn")
LEVELS = {"1 bit": 2, "ternary": 3, "2 bit": 4, "4 bit": 16}
METHODS = ("straight_through", *EVALUATIONS_OF, "post_training")
PER_STEP = {"straight_through": 1, **EVALUATIONS_OF}  # evaluations before the freeze

WARM_STEPS = 680  # 40 epochs of batch 64
EVALUATIONS = 1020  # 60 epochs
BATCH = 64
RATE, MOMENTUM, DECAY = 0.05, 0.9, 1e-4
FREEZE_AT = 0.8

# Points below float that a mean over seeds may lose, by architecture: what a prototype reached, with room for noise.
BANDS = {
    ("simultaneous", "1 bit"): (1.0, 1.5),
    ("alternating", "1 bit"): (1.0, 1.5),
    ("simultaneous", "2 bit"): (1.0, 1.5),
    ("alternating", "2 bit"): (1.0, 1.5),
    ("straight_through", "1 bit"): (0.7, 0.7),
    ("hard", "1 bit"): (4.0, 5.0),
    **{(method, "4 bit"): (0.7, 0.7) for method in METHODS[:-1]},
}


@dataclass(frozen=True)
class Row:
    """One trained network. accuracy: test %, of the packed network for every method but float."""

    task: str
    architecture: str
    method: str
    width: str
    seed: int
    accuracy: float
    evaluations: int
    seconds: float


@lru_cache(maxsize=1)
def _digits() -> tuple[Any, Tensor, Tensor]:
    dataset = data.digits()
    return dataset, torch.from_numpy(dataset.x), torch.from_numpy(dataset.y)


def _batches(indices: Tensor, steps: int, seed: int, purpose: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled epochs without end, cut to `steps` batches; a rest too short for a batch is dropped."""
    _, x, y = _digits()
    generator = torch_generator(seed, purpose)
    order = indices[:0]
    for _ in range(steps):
        if len(order) < BATCH:
            order = indices[torch.randperm(len(indices), generator=generator)]
        batch, order = order[:BATCH], order[BATCH:]
        yield x[batch], y[batch]


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)


def _train_float(model: nn.Module, indices: Tensor, steps: int, seed: int, purpose: str) -> None:
    optimizer = _sgd(model)
    for x, y in _batches(indices, steps, seed, purpose):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@lru_cache(maxsize=4)
def _warm(architecture: str, seed: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The float network that every method starts from, and the indices of the three parts."""
    dataset, _, _ = _digits()
    split = data.split(dataset.y, seed)
    train, val, test = (torch.from_numpy(part) for part in (split.train, split.val, split.test))
    model = models.build(architecture, dataset.input_shape, dataset.num_classes, seed)
    _train_float(model, train, WARM_STEPS, seed, "warm")
    return model, train, val, test


@torch.no_grad()
def _accuracy(model: nn.Module, indices: Tensor) -> float:
    _, x, y = _digits()
    model.eval()
    return 100.0 * float((model(x[indices]).argmax(1) == y[indices]).double().mean())


def steps_for(method: str) -> int:
    """Steps that take EVALUATIONS gradient evaluations: `per` each before the freeze and one each after it."""
    return round(EVALUATIONS / (PER_STEP[method] * FREEZE_AT + 1 - FREEZE_AT))


def _train_quantized(model: nn.Module, indices: Tensor, method: str, seed: int) -> int:
    steps = steps_for(method)
    if method == "straight_through":
        optimizer: Any = qk.StraightThrough(model, _sgd(model), freeze_at=FREEZE_AT, total_steps=steps)
    else:
        optimizer = qk.QuPeD(model, _sgd(model), variant=method, freeze_at=FREEZE_AT, total_steps=steps)
    for x, y in _batches(indices, steps, seed, "train"):
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    optimizer.finish()
    return optimizer.evaluations


def run(architecture: str, method: str, width: str, seed: int, part: str = "test") -> Row:
    """Train one network and read its accuracy on `part` ("val" while settings are being chosen, "test" for the table)."""
    warm, train, val, test = _warm(architecture, seed)
    started = time.perf_counter()
    model = copy.deepcopy(warm).train()
    evaluations = EVALUATIONS
    if method in ("float", "post_training"):
        _train_float(model, train, EVALUATIONS, seed, "train")
    if method != "float":
        qk.quantize_(model, levels=LEVELS[width], rule=lambda *_: True)
        if method != "post_training":
            evaluations = _train_quantized(model, train, method, seed)
        qk.pack_(model)
    if method == "post_training" and architecture == "cnn":
        _, x, _ = _digits()
        qk.recalibrate_(model, x[train].split(BATCH))
    accuracy = _accuracy(model, {"val": val, "test": test}[part])
    return Row("digits", architecture, method, width, seed, accuracy, evaluations, time.perf_counter() - started)


def run_job(job: tuple[str, str, str, int]) -> Row:
    return run(*job)


NETWORKS_PER_START = 1 + len(LEVELS) * len(METHODS)  # float, and each method at each width


def jobs(seeds: int) -> list[tuple[str, str, str, int]]:
    """Every network of the table, those of one warm start together."""
    widths = [("float", "float"), *((method, width) for width in LEVELS for method in METHODS)]
    return [(arch, method, width, seed) for arch in ARCHITECTURES for seed in range(seeds) for method, width in widths]


def _error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def table(rows: list[Row]) -> str:
    """Mean test % and the standard error of its paired difference from float, as a Markdown table; then the bands."""
    found: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        found[row.architecture, row.method, row.width][row.seed] = row.accuracy
    lines = ["| network, width | float | " + " | ".join(m.replace("_", " ") for m in METHODS) + " |"]
    lines.append("| --- " * (len(METHODS) + 2) + "|")
    bands = []
    for arch in ARCHITECTURES:
        base = found[arch, "float", "float"]
        for width in LEVELS:
            cells = [f"{statistics.mean(base.values()):.2f}"]
            for method in METHODS:
                values = found[arch, method, width]
                lost = [base[seed] - value for seed, value in values.items()]
                cells.append(f"{statistics.mean(values.values()):.2f} ({_error(lost):.2f})")
                if (method, width) in BANDS:
                    allowed = BANDS[method, width][ARCHITECTURES.index(arch)]
                    kept = "kept" if statistics.mean(lost) <= allowed else "MISSED"
                    name = f"{arch} {width} {method}"
                    bands.append(
                        f"  {name:<36} {statistics.mean(lost):5.2f} +- {_error(lost):.2f}, band {allowed}: {kept}"
                    )
            lines.append(f"| {arch.upper()}, {width} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "points below float, mean +- standard error, and the band:", *bands])


def record(row: Row) -> dict[str, Any]:
    return asdict(row)
