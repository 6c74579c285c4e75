"""Running the cells of a set: each in its directory, continued where it was killed, and by one process at a time.

<out>/<set>/seed0/rounds/quped-2/        the run, as `python -m fl run` leaves it
<out>/<set>/seed0/rounds/fedavg@30/      what its clients ship after other numbers of adaptation steps: models, summary.json
<out>/<set>/seed0/rounds/quped-2.json    where and with what it was started
<out>/<set>/tuning/quped-2/0/            a trial
"""

import json
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fl import data
from fl.core import make_clients
from fl.errors import DivergedError
from fl.paper.study import Cell
from fl.result import RunResult
from fl.setup import make_config_federation
from fl.storage import write_atomic

OnCell = Callable[[Cell, RunResult | None], None]
ORIGIN = ".json"  # ends the name of the file beside a run that says what it was started with


def run_cells(cells: Sequence[Cell], directory: Path, data_directory: Path | None, on_cell: OnCell) -> list[Cell]:
    """Run what is not finished, in order; returns the cells that another process is running.

    directory: of the set.  on_cell: called with each cell when it has finished, and its run; None: it has diverged.
    """
    load = lru_cache(maxsize=1)(lambda name: data.load(name, data_directory))
    taken = []
    for cell in cells:
        with _claimed(directory / cell.path) as mine:
            if not mine:
                taken.append(cell)
                continue
            on_cell(cell, _run_cell(cell, directory, load))
    return taken


def _run_cell(cell: Cell, directory: Path, load: Callable[[str], data.Dataset]) -> RunResult | None:
    path, chosen = directory / cell.path, cell.config
    origin = path.with_name(path.name + ORIGIN)
    if not origin.exists():
        write_atomic(origin, json.dumps(_origin(), indent=1).encode() + b"\n")
    elif "diverged" in json.loads(origin.read_text()):
        return None
    dataset = load(chosen.data.name)
    clients = make_clients(dataset, chosen.equipment, seed=chosen.experiment.seed, plan=chosen.data)
    federation = make_config_federation(chosen, cell.method.algorithm, clients)
    try:
        result = federation.run(path, resume=True)
    except DivergedError as error:  # the same again on every run: a result, not an accident
        write_atomic(origin, json.dumps({**_origin(), "diverged": str(error)}, indent=1).encode() + b"\n")
        return None
    for line, steps in cell.method.lines if cell.trial is None else []:
        out = path.with_name(line)
        if steps is not None and steps != cell.method.adapt[0] and not (out / "summary.json").is_file():
            federation.adapted(steps, path, out)
    return result


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone may run the cell; the claim ends with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: the user sees to it that a set is run once
        yield True
        return
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@lru_cache(maxsize=1)
def _origin() -> dict[str, Any]:
    """What a cell's numbers owe to the place that computed them."""
    return {"commit": _commit(), "machine": _processor(), "torch": torch.__version__}


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        name = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    found = [line.split(":", 1)[1].strip() for line in names if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()
