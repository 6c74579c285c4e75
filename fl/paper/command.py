"""`python -m fl paper SET`: runs a set of fl/configs/paper, or goes on with it, and shows its table."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fl import data
from fl.errors import INTERRUPTED, ConfigError, UserError
from fl.page import write_groups
from fl.paper import rows as table
from fl.paper import text
from fl.paper.cells import ORIGIN, run_cells
from fl.paper.picture import draw
from fl.paper.study import COLUMNS, Cell, Study, load
from fl.result import RunResult


def add(app: typer.Typer, console: Any) -> None:
    """Give the command line `paper`."""

    def show(words: str) -> None:
        console.print(words, highlight=False, soft_wrap=True, markup=False)

    @app.command()
    def paper(
        name: Annotated[str, typer.Argument(metavar="SET", help="a set of fl/configs/paper, a0 say, or a TOML file")],
        seeds: Annotated[str | None, typer.Option(help="these seeds alone, as 0,1")] = None,
        only: Annotated[list[str] | None, typer.Option(help="this method alone; may be repeated")] = None,
        column: Annotated[str | None, typer.Option(help=f"this column alone: {', '.join(COLUMNS)}")] = None,
        tune: Annotated[bool, typer.Option("--tune", help="run the tuning's trials and show them")] = False,
        show_table: Annotated[bool, typer.Option("--table", help="run nothing, show the table")] = False,
        record: Annotated[Path | None, typer.Option(help="write the rows as JSON lines here")] = None,
        page: Annotated[Path | None, typer.Option(help="write an HTML page of the first column's runs here")] = None,
        picture: Annotated[Path | None, typer.Option(help="draw the rows here, as .png or .svg")] = None,
        rows: Annotated[Path | None, typer.Option("--rows", help="show the table of these JSON lines")] = None,
        detach: Annotated[bool, typer.Option("--detach", help="run in the background, with a log")] = False,
        out: Annotated[Path, typer.Option(help="directory of all sets")] = Path("runs/paper"),
        data_directory: Annotated[
            Path | None, typer.Option("--data", help=f"directory of data files, else {data.DATA_VARIABLE}")
        ] = None,
    ) -> None:
        """Run SET, or go on with it where it was killed, and show its table."""
        try:
            study = load(name)
            files = _Files(record, page, picture)
            if rows is not None:
                files.write(study, table.load_rows(rows, study), show)
                return
            if column is not None and column not in study.columns:
                raise ConfigError(f"paper: column must be one of {', '.join(study.columns)}, got {column!r}")
            directory = out / study.name
            if detach and not show_table:
                show(_detach(directory))
                return

            def run(cells: Sequence[Cell]) -> None:
                if not show_table:
                    for cell in run_cells(cells, directory, data.data_directory(data_directory), _teller(show)):
                        show(f"{_words(cell)}: another process is running it")

            if tune:
                files.write_trials(_tune(study, only or [], directory, run), show)
            else:
                run(study.cells(_numbers(seeds), only or [], column))
                groups = partial(table.groups, study, directory, column or COLUMNS[0])
                files.write(study, table.read_rows(study, directory), show, groups)
        except KeyboardInterrupt:
            print(
                "paper: interrupted, the same command goes on where it was; --table shows how far it came",
                file=sys.stderr,
            )
            raise typer.Exit(INTERRUPTED) from None
        except UserError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(2) from error


@dataclass(frozen=True)
class _Files:
    """Where rows go besides the screen, each if asked for."""

    record: Path | None
    page: Path | None
    picture: Path | None

    def write(
        self,
        study: Study,
        rows: Sequence[table.Json],
        show: Callable[[str], None],
        groups: Callable[[], Any] | None = None,
    ) -> None:
        """groups makes the page's runs; rows that were read from a file have none, and no copy of them is written."""
        show(text.markdown(study, rows))
        if self.picture is not None:
            draw(study, rows, self.picture)
        if groups is None:
            return
        if self.record is not None:
            table.write_rows(rows, self.record)
        if self.page is not None:
            write_groups(groups(), self.page)

    def write_trials(self, trials: Sequence[table.Json], show: Callable[[str], None]) -> None:
        show(text.trials(trials))
        if self.record is not None:
            table.write_rows(trials, self.record)


def _numbers(seeds: str | None) -> list[int] | None:
    try:
        return None if seeds is None else [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise ConfigError(f"paper: seeds must be numbers with commas between them, got {seeds!r}") from error


def _words(cell: Cell) -> str:
    trial = f"trial {dict(cell.trial or {})}, {cell.rounds} rounds"
    what = trial if cell.trial is not None else f"seed {cell.seed} equal {cell.column}"
    return f"{cell.method.name} {what}"


def _teller(show: Any) -> Any:
    """Says each cell when it has finished; cells that had finished before are said at once."""

    def on_cell(cell: Cell, result: RunResult | None) -> None:
        if result is None:
            show(f"{time.strftime('%H:%M:%S')} {_words(cell)}: diverged")
            return
        share = sum(row.validation for row in result.clients) / len(result.clients)
        what = f"{100 * result.mean_accuracy:.2f} %" if cell.trial is None else f"validation {100 * share:.2f} %"
        show(f"{time.strftime('%H:%M:%S')} {_words(cell)}: {what}, {result.seconds:.0f} s")

    return on_cell


def _detach(directory: Path) -> str:
    """Start this very command again without --detach, in a session of its own; returns what to tell."""
    directory.mkdir(parents=True, exist_ok=True)
    arguments = [argument for argument in sys.argv[1:] if argument != "--detach"]
    log = directory / "log.txt"
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "fl", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    return f"process {process.pid} runs, its words go to {log}; the same command continues what is killed"


def _tune(
    study: Study, only: Sequence[str], directory: Path, run: Callable[[Sequence[Cell]], None]
) -> list[table.Json]:
    """Run the trials and then the finalists, of those methods whose trials have all come to an end; a row for each."""
    trials = study.trials(only)
    run(trials)
    rows = _trial_rows(study, trials, directory)
    if study.tuning is None or study.tuning.finalists is None:
        return rows
    finalists = {}
    for method in study.methods:
        mine = [row for row, cell in zip(rows, trials, strict=True) if cell.method is method]  # trial by trial
        if all(row["state"] in ("finished", "diverged") for row in mine):
            ranked = sorted((-row["validation"], n) for n, row in enumerate(mine) if row["validation"] is not None)
            finalists[method.name] = [n for _, n in ranked[: study.tuning.finalists]]
    finals = study.finals(finalists)
    run(finals)
    return rows + _trial_rows(study, finals, directory)


def _trial_rows(study: Study, cells: Sequence[Cell], directory: Path) -> list[table.Json]:
    """One row a trial; validation in percent, None where it has not finished."""
    found = []
    for cell in cells:
        path = directory / cell.path
        origin = table.read_json(path.with_name(path.name + ORIGIN)) or {}
        summary = table.read_json(path / "summary.json")
        manifest = table.read_json(path / "run.json") or {}
        state = "diverged" if "diverged" in origin else f"round {manifest.get('round', 0)} of {cell.rounds}"
        clients = [] if summary is None else [100 * client["validation"] for client in summary["clients"]]
        found.append(
            {
                "set": study.name,
                "method": cell.method.name,
                "trial": dict(cell.trial or {}),
                "rounds": cell.rounds,
                "seed": cell.seed,
                "validation": sum(clients) / len(clients) if clients else None,
                "state": "finished" if clients else state,
                **{key: origin.get(key) for key in ("commit", "machine", "torch")},
            }
        )
    return found
