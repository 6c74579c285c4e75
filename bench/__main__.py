"""Measurements: kernels against the machine's limit and their rivals, what they buy in training, and accuracy.

The timings run in processes of their own with glibc's malloc tuned; --runs 5 gives the medians the README quotes, --quick a
smoke test, --show prints the tables of stored records again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from qupedkern.backends import cpp

from . import records, runs

RESULTS = Path(__file__).resolve().parent / "results"
TIMINGS = {  # command: what it times, and its names; the module of that name has rows(), TABLES and defaults
    "soft": ("soft_quantize forward and backward", "layer, 64k, 1M, 16M, 64M, ResNet-20"),
    "step": ("quped_step, the weight update in one pass", "layer, 64k, 1M, 16M, 64M, ResNet-20"),
    "ops": ("single ops", "layer, 64k, 1M, 16M, 64M"),
    "distill": ("distillation_loss forward and backward", "numbers of examples; --m are those of classes"),
    "linear": ("packed linear layers, cold", "4096x4096, 4096x11008, 11008x4096 (out x in)"),
    "model": (
        "packed models end to end",
        "ResNet-20, ResNet-32, MLP 4 x 4096, decoder block 2048, embedding 32000 x 512",
    ),
    "kmeans": ("exact k-means in one dimension, in time and error", "30k, 270k, 1M, 16M"),
}
RESNET20 = "train_resnet20"
ROUNDS = 15
FLAGS = {
    "linear": ("--shapes", "--bits"),
    "model": ("--models", "--bits"),
}  # what names and levels are called, where not --tensors and --m
CHOICES = {"ops": ("op",), "linear": ("batches", "dtypes")}  # options that only some commands have, passed to rows()


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"\nrecords: {path}")


def train_digits(options: argparse.Namespace) -> None:
    """Every network of the table, in worker processes of one torch thread each; same seeds, same numbers."""
    import torch
    from rich.progress import track

    from . import digits, machine

    todo = digits.jobs(options.seeds)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        done = pool.map(digits.run_job, todo, chunksize=digits.NETWORKS_PER_START)
        rows = list(track(done, total=len(todo), description="digits"))
    print(digits.table(rows))
    _write(
        options.out or RESULTS / "digits.jsonl",
        [{**digits.record(row), **machine.description(), "threads": 1} for row in rows],
    )


def time_and_show(options: argparse.Namespace) -> None:
    """A timing command: in a process of its own it times; above it collects, stores and prints."""
    module = importlib.import_module(f".{options.module}", __package__)
    if options.records_to is not None:
        found = module.rows(
            options.tensors or (module.QUICK if options.quick else module.NAMES),
            options.m or module.LEVELS,
            rounds=2 if options.quick else options.rounds or getattr(module, "ROUNDS", ROUNDS),
            threads=options.threads,
            compiled=options.compile and not options.quick,
            **{name: getattr(options, name) for name in CHOICES.get(options.module, ())},
        )
        records.write(options.records_to, found)
        return
    stored = RESULTS / f"{options.module.replace('_', '-')}.jsonl"
    path = options.out or (None if options.quick and not options.show else stored)
    if options.show:
        found = [row for row in records.read(options.out or stored) if _chosen(row, options)]
    else:
        if (why := cpp.unavailable()) is not None:
            print(f"bench: native calls are not timed and ops run in eager PyTorch: {why}", file=sys.stderr, flush=True)
        found = runs.in_processes(options.arguments, options.runs)
        if path is not None:
            records.write(path, records.merged(records.read(path), found) if options.keep and path.is_file() else found)
    print("\n\n".join(filter(None, (table.render(found) for table in module.TABLES))))
    if path is not None:
        print(f"\nrecords: {path}", file=sys.stderr)
    if path is not None and found and hasattr(module, "picture"):
        module.picture(records.read(path), path.with_suffix(".png"))  # of all that is stored
        print(f"picture: {path.with_suffix('.png')}", file=sys.stderr)


def _chosen(row: records.Row, options: argparse.Namespace) -> bool:
    """Whether the options ask for this row; those not given ask for all."""
    asked = [(row.name, options.tensors), (row.m, options.m), (row.dtype, getattr(options, "dtypes", None))]
    asked += [(row.machine["threads"], options.threads and (options.threads,))]
    asked += [(int(row.variant.split()[-1]), options.batches)] if getattr(options, "batches", None) else []
    return all(not wanted or value in wanted for value, wanted in asked)


def _file(text: str) -> Path:
    """Where records go, refused before anything is timed for them."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a file for the records, got the folder {text}")
    return Path(text)


def _add_timing(parser: argparse.ArgumentParser, module: str, names: str) -> None:
    name_flag, level_flag = FLAGS.get(module, ("--tensors", "--m"))
    parser.add_argument(name_flag, dest="tensors", type=_names, metavar="NAMES", help=f"comma-separated: {names}")
    counted = "bits" if level_flag == "--bits" else "numbers of centers"
    parser.add_argument(level_flag, dest="m", type=_numbers, metavar="NUMBERS", help=f"comma-separated {counted}")
    parser.add_argument(
        "--threads",
        type=int,
        help="for all (default: 1 in cache, 2 else; linear and model: both; in training torch's own)",
    )
    parser.add_argument("--runs", type=int, default=1, help="separate processes whose medians count (5 to publish)")
    parser.add_argument(
        "--rounds", type=int, help=f"samples of each candidate in a process (default {ROUNDS}; linear 5)"
    )
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="without torch.compile, slow to start"
    )
    parser.add_argument("--quick", action="store_true", help="small, two samples: only shows that it works")
    parser.add_argument("--keep", action="store_true", help="keep the stored records of cases this does not time")
    parser.add_argument(
        "--show", action="store_true", help="print the tables of the records in --out, all or those asked for"
    )
    parser.add_argument("--out", type=_file, help="records (default: in bench/results; with --quick none)")
    parser.add_argument(runs.WORKER, dest="records_to", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(run=time_and_show, module=module)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (says, names) in TIMINGS.items():
        timing = commands.add_parser(name, help=says)
        _add_timing(timing, name, names)
        if name == "ops":
            timing.add_argument("--op", help="one op (default: all)")
        if name == "linear":
            timing.add_argument("--batch", dest="batches", type=_numbers, metavar="NUMBERS", help="rows of the input")
            timing.add_argument("--dtypes", type=_names, metavar="NAMES", help="of the input: float32, bfloat16")
    _add_timing(
        commands.add_parser("fl", help="a federated round: engines and a plain loop"), "fl_round", "CNN, CNN2, MLP"
    )
    training = commands.add_parser("train", help="training: accuracy on digits, time of a step of ResNet-20")
    tasks = training.add_subparsers(dest="task", required=True)
    _add_timing(tasks.add_parser("resnet20", help="a step by phase, by method"), RESNET20, "ResNet-20, ResNet-8")
    train = tasks.add_parser("digits", help="accuracy of Algorithm 1 at equal gradient evaluations")
    train.add_argument("--seeds", type=int, default=5)
    train.add_argument("--jobs", type=int, default=2, help="worker processes")
    train.add_argument("--out", type=_file)
    train.set_defaults(run=train_digits)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options.run(options)
    except (RuntimeError, KeyError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
