"""Runs side by side, finished or not: one line for those that differ by nothing but their seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fl.errors import CheckpointError
from fl.report import MIB, NAMES
from fl.result import ClientRow, row_from_json

DECILE = 0.1


@dataclass(frozen=True)
class Run:
    """One run as its directory tells it. clients: of a finished run; None while it is not."""

    directory: Path
    manifest: dict[str, Any]
    records: list[dict[str, Any]]
    clients: list[ClientRow] | None
    seconds: float

    @property
    def description(self) -> dict[str, Any]:
        return self.manifest["description"]

    @property
    def seed(self) -> int:
        return int(self.description["job"]["seed"])

    @property
    def rounds(self) -> int:
        """Rounds done."""
        return int(self.manifest.get("round", 0))

    @property
    def accuracies(self) -> np.ndarray:
        """Of each client: from its shipped file, or of an unfinished run from the last record."""
        if self.clients is not None:
            return np.array([row.accuracy for row in self.clients])
        return np.array(self.records[-1]["accuracy"])

    def total(self, key: str) -> int:
        return sum(int(record[key]) for record in self.records)

    @property
    def evaluations(self) -> int:
        if self.clients is not None:
            return sum(row.evaluations for row in self.clients)
        return sum(sum(record["evaluations"].values()) for record in self.records)


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these directories, each a run's own or one that holds runs, as `run --out` leaves them."""
    runs = []
    for path in paths:
        here = (
            [path] if (path / "run.json").is_file() else sorted((p.parent for p in path.glob("*/run.json")), key=_order)
        )
        if not here:
            raise CheckpointError(f"compare: {path} holds no run, give directories that `python -m fl run` has written")
        runs += [read_run(directory) for directory in here]
    started = [run for run in runs if run.records]
    if not started:
        raise CheckpointError("compare: none of these runs has finished a round")
    return started


def _order(directory: Path) -> tuple[bool, str]:
    """QuPeD first: the others are compared with it."""
    return directory.name != "quped", directory.name


def read_run(directory: Path) -> Run:
    """The run of a directory."""
    try:
        manifest = json.loads((directory / "run.json").read_text())
        records = []
        if "record_bytes" in manifest:
            content = (directory / "records.jsonl").read_bytes()[: manifest["record_bytes"]]
            records = [json.loads(line) for line in content.splitlines()]
        clients, seconds = None, sum(record["seconds"] for record in records)
        if manifest.get("finished"):
            summary = json.loads((directory / "summary.json").read_text())
            clients, seconds = [row_from_json(row) for row in summary["clients"]], summary["seconds"]
        return Run(directory, manifest, records, clients, seconds)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"compare: {directory} cannot be read as a run: {error}") from error


@dataclass(frozen=True)
class Group:
    """Runs of one experiment with different seeds. label: the algorithm, and what sets it apart from others of its name."""

    label: str
    runs: list[Run]

    @property
    def finished(self) -> bool:
        return all(run.clients is not None for run in self.runs)

    @property
    def accuracies(self) -> np.ndarray:
        """Percent, [seeds, clients]."""
        return 100 * np.stack([run.accuracies for run in self.runs])

    @property
    def worst_decile(self) -> float:
        """Percent, see worst_decile."""
        return worst_decile(self.accuracies)

    def row(self) -> dict[str, Any]:
        """The group's line of the table; sd over seeds is None where there is one."""
        per_seed = self.accuracies.mean(axis=1)
        models = [row.model_bytes for run in self.runs for row in run.clients or ()]
        return {
            "label": self.label,
            "seeds": len(self.runs),
            "mean": float(per_seed.mean()),
            "sd_seeds": float(per_seed.std(ddof=1)) if len(self.runs) > 1 else None,
            "sd_clients": float(self.accuracies.std(axis=1, ddof=1).mean()) if self.accuracies.shape[1] > 1 else None,
            "worst_decile": self.worst_decile,
            "down": float(np.mean([run.total("bytes_down") for run in self.runs])) / MIB,
            "up": float(np.mean([run.total("bytes_up") for run in self.runs])) / MIB,
            "evaluations": float(np.mean([run.evaluations for run in self.runs])),
            "seconds": float(np.mean([run.seconds for run in self.runs])),
            "model": float(np.mean(models)) / 1024 if models else None,
            "rounds": min(run.rounds for run in self.runs),
            "planned": self.runs[0].description["job"]["rounds"],
            "finished": self.finished,
        }

    def ahead_of(self, other: "Group") -> tuple[float, float] | None:
        """(mean, standard error) of this group's accuracy minus other's, in points, client by client, over shared seeds.

        None where they share no seed with the same clients' data.
        """
        gaps = [
            100 * (run.accuracies - twin.accuracies)
            for run in self.runs
            for twin in other.runs
            if twin.seed == run.seed and _data(twin) == _data(run)
        ]
        if not gaps:
            return None
        return mean_and_error(np.stack(gaps))


def worst_decile(accuracies: np.ndarray) -> float:
    """Mean over the seeds of the mean of the lowest tenth of the clients, of one client at least. accuracies: [seeds, clients]."""
    values = np.sort(accuracies, axis=1)
    return float(values[:, : max(1, round(DECILE * values.shape[1]))].mean())


def mean_and_error(gaps: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences [seeds, clients], and its standard error sd / sqrt(n) over all n pairs; 0 for a single one.

    A seed deals out other data: client 3 of two seeds are two clients, so pairs are pooled and not averaged by number.
    """
    if gaps.size < 2:
        return float(gaps.mean()), 0.0
    return float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(gaps.size))


def _data(run: Run) -> list[str]:
    return [client["data"] for client in run.description["clients"]]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in their seed alone, together; in the order in which they were given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        same = groups.setdefault(json.dumps(_setting(run), sort_keys=True), [])
        if all(other.seed != run.seed for other in same):  # the same run, named twice
            same.append(run)
    ordered = [Group(run[0].description["algorithm"], sorted(run, key=lambda one: one.seed)) for run in groups.values()]
    return [replace(group, label=_label(group, ordered)) for group in ordered]


def _setting(run: Run) -> dict[str, Any]:
    """What runs of a group share: all but the seed, and the data that the seed deals out."""
    job = {key: value for key, value in run.description["job"].items() if key != "seed"}
    clients = [{key: value for key, value in client.items() if key != "data"} for client in run.description["clients"]]
    return {**run.description, "job": job, "clients": clients}


def _label(group: Group, groups: Sequence[Group]) -> str:
    """The algorithm's name, and those of its settings in which groups of that name differ."""
    name = group.runs[0].description["algorithm"]
    alike = [_flat(one) for one in groups if one.runs[0].description["algorithm"] == name]
    own = _flat(group)
    apart = [key for key in own if any(other.get(key) != own[key] for other in alike)]
    shown = NAMES.get(name, name)
    return shown + (f" ({', '.join(f'{key} {own[key]}' for key in apart)})" if apart else "")


def _flat(group: Group) -> dict[str, Any]:
    description = group.runs[0].description
    counted: dict[str, int] = {}
    for client in description["clients"]:
        device = f"{client['architecture']} {client['bits']}"
        counted[device] = counted.get(device, 0) + 1
    clients = ", ".join(f"{count} x {device}" for device, count in counted.items())
    job = {key: value for key, value in description["job"].items() if key != "seed"}
    return {**description["parameters"], **job, "clients": clients}
