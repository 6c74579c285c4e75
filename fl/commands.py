"""`python -m fl serve` and `python -m fl join`: a federation over several machines, by Flower."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fl import config as configuration
from fl import data, report
from fl.engines import deployment
from fl.errors import UserError
from fl.setup import check_directory, check_served

DEFAULT_PORT = 9092  # of flower-superlink, as in Flower's own examples
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def add(app: typer.Typer) -> None:
    """Give the command line these two."""
    app.command(context_settings=PASSED_ON)(serve)
    app.command(context_settings=PASSED_ON)(join)


def serve(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="the run's description, a TOML file")],
    algorithm: Annotated[str | None, typer.Option(help="run this algorithm")] = None,
    rounds: Annotated[int | None, typer.Option(help="number of rounds")] = None,
    seed: Annotated[int | None, typer.Option(help="the number that fixes every draw")] = None,
    out: Annotated[Path | None, typer.Option(help="directory for the results")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = DEFAULT_PORT,
    patience: Annotated[float, typer.Option(help="seconds to wait for nodes that do not answer")] = 600.0,
    node_key: Annotated[
        list[Path] | None,
        typer.Option(help="public key of a node, once for each; no other node may join then"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue a run that was stopped")] = False,
) -> None:
    """Serve CONFIG to nodes on other machines (extra 'flower'). Further options go to flower-superlink, TLS for one."""
    given = {"algorithm": algorithm, "rounds": rounds, "seed": seed}
    overrides = {key: value for key, value in given.items() if value is not None}
    with _one_sentence():
        chosen = configuration.load(config).override(**overrides)
        check_served(chosen)
        experiment = chosen.experiment
        directory = out or Path(experiment.out or f"runs/{experiment.name}")
        check_directory(directory, [experiment.algorithm], resume)
        directory /= experiment.algorithm
        result = deployment.serve(
            config,
            overrides,
            directory,
            host=host,
            port=port,
            resume=resume,
            patience=patience,
            node_keys=node_key or (),
            options=context.args,
        )
    console = report.terminal()
    report.print_clients([result], console)
    console.print(f"records  {directory}/records.jsonl, summary.json", highlight=False, soft_wrap=True, markup=False)


def join(
    context: typer.Context,
    clients: Annotated[str, typer.Argument(help="the clients that this node has, as 0 or 0,1,2 or 0-9")],
    state: Annotated[Path, typer.Option(help="directory for what is theirs: states and models")],
    server: Annotated[str, typer.Option(help="address of the server")] = f"127.0.0.1:{DEFAULT_PORT}",
    data_directory: Annotated[
        Path | None,
        typer.Option("--data", help=f"directory of data files, else {data.DATA_VARIABLE}"),
    ] = None,
) -> None:
    """Join a server as a node that has CLIENTS (extra 'flower'). Further options go to flower-supernode."""
    with _one_sentence():
        numbers = deployment.parse_clients(clients)
        files = data.data_directory(data_directory)
        code = deployment.join(numbers, state, server=server, data_directory=files, options=context.args)
    raise typer.Exit(code)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """What a user got wrong, on standard error, and exit code 2."""
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from error
