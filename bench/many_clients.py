"""A federation of very many clients in little memory: `python -m bench.many_clients`, 10,000 of them unless told otherwise.

Every client has a 30k-parameter MLP of its own at 1, 2 or 4 bits or in float, on twelve 13 x 13 images of noise: what is
measured is memory, disk and time, not accuracy. A client's state lies in its file; memory holds at most those of a round.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fl import Client, Federation, algorithms
from fl.data import ClientData, Part
from fl.models import build

from . import machine

SHAPE, CLASSES = (1, 13, 13), 10
TRAIN, VALIDATION, IMAGES = 6, 2, 12
BITS = (1, 2, 4, "float")
MIB = 2**20


def make_clients(count: int) -> list[Client]:
    """Clients whose images are views of one tensor of noise."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, IMAGES, *SHAPE, generator=random)
    y = torch.randint(0, CLASSES, (count, IMAGES), generator=random)
    y[0, 0] = CLASSES - 1
    cuts = (slice(0, TRAIN), slice(TRAIN, TRAIN + VALIDATION), slice(TRAIN + VALIDATION, IMAGES))
    return [
        Client(
            number,
            "mlp",
            BITS[number % len(BITS)],
            ClientData(tuple(y[number].unique().tolist()), *(Part(x[number, cut], y[number, cut]) for cut in cuts)),
        )
        for number in range(count)
    ]


def peak_mib(who: int = resource.RUSAGE_SELF) -> float:
    """Largest resident memory so far, MiB; of the children: that of the largest one."""
    status = Path("/proc/self/status")
    if (
        who == resource.RUSAGE_SELF and status.is_file()
    ):  # Linux counts in ru_maxrss what the process was before its exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(who).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)


def measure(count: int, drawn: int, rounds: int, engine: str, workers: int | None, out: Path) -> dict[str, Any]:
    """Run it, telling each round on standard error; returns a record of what it took."""
    started = time.perf_counter()
    clients = make_clients(count)
    data_mib = peak_mib()
    federation = Federation(
        algorithm=algorithms.QuPeD(local_steps=2, freeze_at=1.0),
        clients=clients,
        rounds=rounds,
        sample=drawn / count,
        engine=engine,
        workers=workers,
    )
    passed: list[float] = []

    def on_round(done: int, _: dict[str, Any]) -> None:
        passed.append(time.perf_counter() - started)
        print(f"round {done}: {passed[-1]:.0f} s, {peak_mib():.0f} MiB", file=sys.stderr, flush=True)

    result = federation.run(out, resume=True, on_round=on_round)
    if not passed:
        raise SystemExit(f"many_clients: {out} has finished, its memory cannot be measured again")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "clients": count,
        "drawn": drawn,
        "rounds": rounds,
        "engine": engine,
        "parameters": sum(p.numel() for p in build("mlp", SHAPE, CLASSES, seed=0).parameters()),
        "models": len(result.clients),
        "peak_mib": round(peak_mib(), 1),
        "peak_mib_of_a_worker": round(peak_mib(resource.RUSAGE_CHILDREN), 1),
        "peak_mib_with_data_alone": round(data_mib, 1),
        "disk_mib": round(size / MIB, 1),
        "seconds_to_round_0": round(passed[0], 1),
        "seconds_a_round": round((passed[-1] - passed[0]) / max(1, len(passed) - 1), 2),
        "seconds_to_ship": round(time.perf_counter() - started - passed[-1], 1),
        **machine.description(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--drawn", type=int, default=100, help="clients a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--engine", default="serial")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--directory", type=Path, help="of the run, kept and resumed; else a temporary one")
    parser.add_argument("--out", type=Path, help="file to which the record is written, as JSON")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="many-clients-"))
    try:
        torch.set_num_threads(1)
        record = measure(
            options.clients, options.drawn, options.rounds, options.engine, options.workers, directory / "run"
        )
    finally:
        if options.directory is None:
            shutil.rmtree(directory)
    line = json.dumps(record)
    print(line)
    if options.out is not None:
        options.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
