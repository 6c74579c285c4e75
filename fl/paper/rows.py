"""What the cells of a set have left, as rows: one a line of the table and column, all its seeds together, plain JSON.

Everything that the text shows is computed from rows alone, so a file of them can be judged without the runs.
  set, column, method, label, algorithm, adapt_steps, rounds
  seeds          finished ones, ascending; the lists below have one entry for each
  accuracies     percent, [seeds][clients], of the models as read back from their files;  validation_mean: percent, [seeds]
  shared         percent, [seeds], of the global model on the global test set, null where there is none
  evaluations, bytes_up, bytes_down, model_bytes, seconds    means over these seeds; model_bytes over clients too
  accuracy, sd_seeds, worst_decile, ahead, ahead_se          see Row
  unfinished     {seed: rounds done} of started ones;  diverged: seeds that left the finite numbers
  commits, machine, torch, threads, parameters;  built_with: torch and kernels, as the runs' manifests say
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fl.compare import Group, Run, mean_and_error, read_run, worst_decile
from fl.errors import CheckpointError, ConfigError
from fl.paper.cells import ORIGIN
from fl.paper.study import Cell, Claim, Study
from fl.result import row_from_json

Json = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A claim judged. value: points or percent, None where runs are missing;  error: standard error of a difference.

    seeds: those it was judged by.
    """

    claim: Claim
    value: float | None
    error: float | None
    holds: bool | None
    seeds: tuple[int, ...] = ()


def read_rows(study: Study, directory: Path) -> list[Json]:
    """The rows of a set, in the table's order; lines of which nothing has run have no seeds."""
    rows = []
    for column in study.columns:
        cells = study.cells(column=column)
        for method in study.methods:
            mine = [cell for cell in cells if cell.method is method]
            rows += [_row(study, line, steps, mine, directory) for line, steps in method.lines]
    return with_differences(rows, study.paper.reference)


def groups(study: Study, directory: Path, column: str = "rounds") -> list[Group]:
    """The lines of a column of which anything has run, for a page: the reference first, the others in the table's order."""
    found = []
    for method in study.methods:
        cells = study.cells(only=[method.name], column=column)
        for line, steps in method.lines:
            runs = [run for cell in cells if (run := _run(cell, line, steps, directory)) is not None]
            if runs:
                found.append((line != study.paper.reference, Group(method.label_of(steps), runs)))
    return [group for _, group in sorted(found, key=lambda pair: pair[0])]


def _run(cell: Cell, line: str, steps: int | None, directory: Path) -> Run | None:
    """A cell's run as a line shows it; None where there is nothing to show yet."""
    path = directory / cell.path
    if not (path / "run.json").is_file():
        return None
    run = read_run(path)
    if not run.records or steps in (None, *cell.method.adapt[:1]):
        return run if run.records else None
    again = read_json(path.with_name(line) / "summary.json")
    if again is None:
        return None
    # the run's own clients made other steps: of this line's accuracies the last alone are known
    last = {**run.records[-1], "accuracy_mean": again["accuracy_mean"], "accuracy_worst": again["accuracy_worst"]}
    records = [*({**record, "scored": False} for record in run.records[:-1]), last]
    return replace(
        run, records=records, clients=[row_from_json(row) for row in again["clients"]], seconds=again["seconds"]
    )


def with_differences(rows: Sequence[Json], reference: str) -> list[Json]:
    """The rows with `ahead` and `ahead_se`: of their accuracies to those of the reference in the same column."""
    by_name = {(row["column"], row["method"]): row for row in rows}
    full = []
    for row in rows:
        gap = difference(row, by_name[row["column"], reference]) if row["method"] != reference else None
        full.append({**row, "ahead": gap and gap[0], "ahead_se": gap and gap[1]})
    return full


def difference(one: Json, other: Json) -> tuple[float, float] | None:
    """(mean, standard error) of one's accuracies minus other's, client by client, over the seeds that both have."""
    pairs = [
        np.subtract(one["accuracies"][k], other["accuracies"][other["seeds"].index(seed)])
        for k, seed in enumerate(one["seeds"])
        if seed in other["seeds"]
    ]
    return mean_and_error(np.stack(pairs)) if pairs else None


def judge(claims: Sequence[Claim], rows: Sequence[Json], column: str = "rounds") -> list[Verdict]:
    """Each claim against the rows of a column."""
    by_name = {row["method"]: row for row in rows if row["column"] == column}
    return [_verdict(claim, by_name) for claim in claims]


def _verdict(claim: Claim, rows: Mapping[str, Json]) -> Verdict:
    first = rows[claim.first]
    if claim.shared_at_least is not None:
        if not first["seeds"] or None in first["shared"]:
            return Verdict(claim, None, None, None)
        value = float(np.mean(first["shared"]))
        return Verdict(claim, value, None, value >= claim.shared_at_least, tuple(first["seeds"]))
    assert claim.second is not None
    gap = difference(first, rows[claim.second])
    if gap is None:
        return Verdict(claim, None, None, None)
    holds = gap[0] >= claim.at_least if claim.at_least is not None else abs(gap[0]) <= (claim.within or 0.0)
    seeds = tuple(seed for seed in first["seeds"] if seed in rows[claim.second]["seeds"])
    return Verdict(claim, *gap, holds, seeds)


def _row(study: Study, line: str, steps: int | None, cells: Sequence[Cell], directory: Path) -> Json:
    """One line of a column. steps: of its adaptation."""
    method = cells[0].method
    found, unfinished, diverged, origins = {}, {}, [], {}
    for cell in cells:
        path = directory / cell.path
        origin = read_json(path.with_name(path.name + ORIGIN))
        manifest = read_json(path / "run.json")
        if origin is None:
            continue
        origins[cell.seed] = {**origin, **{key: (manifest or {}).get(key) for key in ("threads", "built_with")}}
        summary = read_json(path.with_name(line) / "summary.json")
        if summary is None and steps in (None, *method.adapt[:1]):
            summary = read_json(path / "summary.json")
        if "diverged" in origin:
            diverged.append(cell.seed)
        elif summary is not None:
            found[cell.seed] = summary
        else:
            unfinished[cell.seed] = int((manifest or {}).get("round", 0))
    seeds = sorted(found)
    summaries = [found[seed] for seed in seeds]
    accuracies = [[100 * client["accuracy"] for client in summary["clients"]] for summary in summaries]
    first = origins[seeds[0]] if seeds else {}
    return {
        "set": study.name,
        "column": cells[0].column,
        "method": line,
        "label": method.label,
        "algorithm": method.algorithm,
        "adapt_steps": steps,
        "rounds": cells[0].rounds,
        "planned": [cell.seed for cell in cells],
        "seeds": seeds,
        "accuracy": _mean([float(np.mean(one)) for one in accuracies]),
        "sd_seeds": float(np.std(np.mean(accuracies, axis=1), ddof=1)) if len(seeds) > 1 else None,
        "worst_decile": worst_decile(np.array(accuracies)) if seeds else None,
        "shared": [None if one["shared_accuracy"] is None else 100 * one["shared_accuracy"] for one in summaries],
        "validation_mean": [100 * float(np.mean([c["validation"] for c in one["clients"]])) for one in summaries],
        **{key: _mean([one[key] for one in summaries]) for key in ("evaluations", "bytes_up", "bytes_down", "seconds")},
        "model_bytes": _mean([float(np.mean([c["model_bytes"] for c in one["clients"]])) for one in summaries]),
        "unfinished": {str(seed): done for seed, done in unfinished.items()},
        "diverged": diverged,
        "commits": sorted({origin["commit"] for origin in origins.values()}),
        "machine": first.get("machine"),
        "torch": first.get("torch"),
        "built_with": sorted({origin["built_with"] for origin in origins.values() if origin["built_with"]}),
        "threads": first.get("threads"),
        "parameters": asdict(cells[0].config.algorithms[method.algorithm]),  # type: ignore[call-overload]  # as in describe
        "accuracies": [[round(value, 4) for value in one] for one in accuracies],
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def read_json(path: Path) -> Json | None:
    """The content of a JSON file, None where there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"paper: {path} cannot be read: {error}") from error


def write_rows(rows: Sequence[Json], path: Path) -> None:
    """One JSON line a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def load_rows(path: Path, study: Study) -> list[Json]:
    """What write_rows wrote of this set."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        names = {row["method"] for row in rows if row["set"] == study.name}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"paper: {path} must hold rows that --record has written, got: {error}") from error
    missing = [line for method in study.methods for line, _ in method.lines if line not in names]
    if missing:
        raise ConfigError(f"paper: {path} must hold the rows of {study.name}, it has none of {', '.join(missing)}")
    return rows
