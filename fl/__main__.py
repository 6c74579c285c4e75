"""`python -m fl run CONFIG`: a federation, and others beside it under the same budget; `paper SET`: a whole table of runs."""

import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fl import commands, data, devices, pictures, report
from fl import config as configuration
from fl.core import CPU
from fl.engines import ENGINES, ranks
from fl.errors import INTERRUPTED, UserError
from fl.federation import Federation
from fl.paper import command as paper
from fl.result import RunResult
from fl.setup import check_backend, check_directory, make_config_clients, make_config_federation
from fl.storage import write_atomic
from fl.trace import Trace

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
console = report.terminal()


@app.callback()
def main() -> None:
    """Federated learning with personal quantized models."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="the run's description, a TOML file")],
    algorithm: Annotated[str | None, typer.Option(help="run this algorithm alone")] = None,
    rounds: Annotated[int | None, typer.Option(help="number of rounds")] = None,
    seed: Annotated[int | None, typer.Option(help="the number that fixes every draw")] = None,
    out: Annotated[Path | None, typer.Option(help="directory for the results")] = None,
    data_directory: Annotated[
        Path | None,
        typer.Option("--data", help=f"directory of data files, else {data.DATA_VARIABLE}"),
    ] = None,
    engine: Annotated[str | None, typer.Option(help=f"who does the clients' work: {', '.join(ENGINES)}")] = None,
    workers: Annotated[int | None, typer.Option(help="processes of the engine 'pool'")] = None,
    device: Annotated[str | None, typer.Option(help="where models train: cpu, cuda, cuda:1 or auto")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue a run that was killed")] = False,
) -> None:
    """Run CONFIG's algorithm, and beside it those it compares with."""
    try:
        check_backend()
        given = {"algorithm": algorithm, "rounds": rounds, "seed": seed}
        given |= {"engine": engine, "workers": workers, "device": device}
        chosen = configuration.load(config).override(**given)
        rank = ranks.rank(chosen.experiment.engine)
        directory = out or Path(chosen.experiment.out or f"runs/{chosen.experiment.name}")
        federations = _federations(chosen, data_directory)
        if rank > 0:
            _follow(federations)
            return
        check_directory(directory, federations, resume)
        for name, federation in federations.items():
            federation.check(directory / name, resume=resume)
        first = next(iter(federations.values()))
        _print_device(first)
        report.print_classes(first.clients, first.job.num_classes, console)
        results = _run_all(federations, directory, resume, configuration.as_given(config, given))
        _report(results, first, directory)
    except UserError as error:
        if ranks.speaks():
            print(error, file=sys.stderr)
        raise typer.Exit(2) from error


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="directories that `run` has written")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
) -> None:
    """Compare runs in one HTML page; those that differ by nothing but their seed share a line."""
    from fl.page import write_page

    try:
        groups = write_page(runs, out)
    except UserError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
    for group in groups:
        row = group.row()
        sd = "" if row["sd_seeds"] is None else f" ± {row['sd_seeds']:.1f}"
        console.print(
            f"{group.label}: {row['mean']:.1f}{sd} %, worst decile {row['worst_decile']:.1f} %, seeds {row['seeds']}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    console.print(f"page     {out}", highlight=False, soft_wrap=True, markup=False)


commands.add(app)
paper.add(app, console)


def _federations(chosen: configuration.Config, data_directory: Path | None) -> dict[str, Federation]:
    """Each algorithm's run, over the same clients."""
    clients = make_config_clients(chosen, data.data_directory(data_directory))
    return {name: make_config_federation(chosen, name, clients) for name in chosen.experiment.names}


def _follow(federations: dict[str, Federation]) -> None:
    """What a rank does that is not the first: silent, even where Ctrl-C ends it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for federation in federations.values():
        federation.run()


def _print_device(federation: Federation) -> None:
    if federation.device != CPU:
        chosen = "" if federation.device != devices.AUTO else ", which is what 'auto' has found"
        line = f"{'device':8} {devices.title(federation.job.device)}{chosen}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _run_all(federations: dict[str, Federation], directory: Path, resume: bool, described: str) -> list[RunResult]:
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
    )
    spread = any(federation.engine == "torchrun" for federation in federations.values())
    stoppable = ranks.stoppable() if spread else nullcontext()
    done = dict.fromkeys(federations, 0)
    results = []
    name = ""
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress, stoppable:
            for name, federation in federations.items():
                task = progress.add_task(name, total=federation.rounds, accuracy="")
                trace = Trace(directory / name, federation.clients)

                def on_round(
                    rounds: int, record: dict[str, Any], name: str = name, task: Any = task, trace: Trace = trace
                ) -> None:
                    done[name] = rounds
                    if not (kept := directory / name / "config.toml").exists():
                        write_atomic(kept, described.encode())
                    trace(rounds, record)
                    accuracy = f"mean {100 * record['accuracy_mean']:5.1f} %"
                    progress.update(task, completed=rounds, accuracy=accuracy)

                results.append(federation.run(directory / name, resume=resume, on_round=on_round))
                progress.update(task, completed=federation.rounds)
    except KeyboardInterrupt:
        rounds = federations[name].rounds
        print(
            f"run: interrupted, {name} has {done[name]} of {rounds} rounds in {directory}; "
            f"the same command with --resume continues it",
            file=sys.stderr,
        )
        raise typer.Exit(INTERRUPTED) from None
    return results


def _report(results: list[RunResult], first: Federation, directory: Path) -> None:
    report.plot(results, directory / "accuracy.png")
    pictures.plot_bytes(results, directory / "bytes.png")
    pictures.plot_clients(results, directory / "clients.png")
    pictures.plot_classes(first.clients, first.job.num_classes, directory / "classes.png")
    centers = ", centers.png" if pictures.plot_centers(results, directory / "centers.png") else ""
    report.print_clients(results, console)
    report.print_comparison(results, console)
    names = [result.algorithm for result in results]
    which = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
    lines = [
        ("pictures", f"{directory}/accuracy.png, bytes.png, clients.png, classes.png{centers}"),
        ("models", f"{directory}/{which}/models/client_*.safetensors"),
        ("records", f"{directory}/{which}/records.jsonl, summary.json, config.toml"),
    ]
    for label, text in lines:
        console.print(f"{label:8} {text}", highlight=False, soft_wrap=True, markup=False)
    memory = _peak_memory_mib()
    if memory is not None:
        console.print(f"{'memory':8} {memory:.0f} MiB at its highest", highlight=False)


def _peak_memory_mib() -> float | None:
    """The largest resident memory of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    app()
