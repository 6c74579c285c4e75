"""A run's directory: what is in it, who may write to it, and how a killed run continues to the same final bits.

run.json             the manifest: what the run is, how many rounds are done, and the files that hold their outcome
records.jsonl        one line a round; only the first `record_bytes` of it are part of the checkpoint
state/               server.<round>.safetensors and client_<id>.<round>.safetensors, each written once; a client that
                     has not been drawn has none
models/, summary.json   written when the run ends

A round's files are written first and the manifest is replaced last, in one atomic step. So whatever moment a process
dies at, the manifest names the whole files of one completed round.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import qupedkern as qk
from fl.algorithms import Algorithm
from fl.core import Client, Job, state_file
from fl.errors import CheckpointError
from fl.storage import Json, Tensors, load_state, make_durable, save_state, write_atomic

_FORMAT = 2


@dataclass(frozen=True)
class Snapshot:
    """A run between two rounds: rounds done, the server's tensors, where each client's state is, one record a round.

    clients: the round whose file holds a client's state; one that has not been drawn is not in it.
    """

    round: int
    server: Tensors
    clients: dict[int, int]
    records: list[dict[str, Any]]


def profile(client: Client) -> Json:
    """All that a run's outcome owes to one client, as JSON: its device, and a hash of its data."""
    return {
        "architecture": client.architecture,
        "bits": client.bits,
        "groups": client.groups,
        "data": _data_hash(client),
    }


def describe(job: Job, algorithm: Algorithm, profiles: Sequence[Json]) -> Json:
    """All that decides a run's outcome, as JSON; two runs with equal descriptions are the same experiment.

    profiles: of the clients, in order of their numbers.
    """
    return json.loads(
        json.dumps(
            {
                "format": _FORMAT,
                "algorithm": algorithm.name,
                "parameters": asdict(algorithm),  # type: ignore[call-overload]
                "job": asdict(job),
                "clients": list(profiles),
            }
        )
    )


def _data_hash(client: Client) -> str:
    digest = hashlib.sha256()
    for part in (client.data.train, client.data.val, client.data.test):
        for tensor in (part.x, part.y):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _built_with() -> str:
    """The torch and the kernels that compute: together with the thread count, what a run's bits depend on."""
    chosen = qk.explain("soft_quantize", torch.zeros(1), torch.tensor([0.0, 1.0]), 1.0).backend
    return f"torch {torch.__version__}, {chosen} {qk.backends().descriptions[chosen]}"


def _is_leftover(path: Path) -> bool:
    """Whether the file is an atomic write's temporary that a killed process left behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _difference(there: Json, here: Json, path: str = "") -> str | None:
    """The first place where two descriptions differ, in words; None where they do not."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys: Iterable[Any] = {**there, **here}
        there, here = ({key: side.get(key) for key in keys} for side in (there, here))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        keys = range(len(there))
    else:
        return None if there == here else f"{path} is {json.dumps(there)[:60]} there and {json.dumps(here)[:60]} here"
    differences = (_difference(there[key], here[key], f"{path}.{key}" if path else str(key)) for key in keys)
    return next((difference for difference in differences if difference is not None), None)


class Checkpoint:
    """The directory of one run. Nothing in it is touched before the run has been recognised as the same experiment."""

    def __init__(self, directory: Path, description: Json) -> None:
        self.directory = directory
        self._description = description
        self._manifest: dict[str, Any] = {}

    def check(self, resume: bool) -> bool:
        """Whether there is a checkpoint to continue from; CheckpointError where the directory is not ours to use.

        Without resume the directory must be absent or empty; with it, it may also hold this very experiment.
        """
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"run: {self.directory} must be a directory, it is a file, choose another --out")
        if not self.directory.exists() or all(_is_leftover(path) for path in self.directory.iterdir()):
            return False
        if not resume:
            raise CheckpointError(f"run: {self.directory} is not empty, continue with --resume or choose another --out")
        manifest = self._read_manifest()
        difference = _difference(manifest["description"], self._description)
        if difference is not None:
            raise CheckpointError(
                f"run: {self.directory} holds another experiment ({difference}), choose another --out for this one"
            )
        self._manifest = manifest
        return "round" in manifest

    @property
    def threads(self) -> int:
        """The thread count that the run was started with."""
        return int(self._manifest["threads"])

    @property
    def finished(self) -> bool:
        """Whether the run's models and summary have been written."""
        return bool(self._manifest.get("finished"))

    def start(self, threads: int) -> None:
        """Make the directory and its first manifest, in which no round is done: whose directory it is, and for what."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._manifest = {"description": self._description, "clients": {}}
        self._write_manifest(threads=threads, built_with=_built_with())
        (self.directory / "state").mkdir(exist_ok=True)

    def load(self) -> Snapshot:
        """The last completed round; what a dying process left behind it is dropped."""
        manifest = self._manifest
        if manifest["built_with"] != _built_with():
            warnings.warn(
                f"run: started with {manifest['built_with']} and resumed with {_built_with()}, "
                f"its results need not equal those of an uninterrupted run",
                stacklevel=2,
            )
        with open(self.directory / "records.jsonl", "r+b") as file:
            file.truncate(manifest["record_bytes"])
            records = [json.loads(line) for line in file.read().splitlines()]
        if len(records) != manifest["round"] + 1:
            raise CheckpointError(
                f"run: {self.directory / 'records.jsonl'} must hold {manifest['round'] + 1} lines, got {len(records)}, "
                f"start again with another --out"
            )
        state = self.directory / "state"
        server, _ = load_state(state / manifest["server"])
        clients = {int(number): int(at) for number, at in manifest["clients"].items()}
        return Snapshot(manifest["round"], server, clients, records)

    def save(self, snapshot: Snapshot) -> None:
        """Write a completed round: the server, its record, then the manifest. The clients' states are in their files."""
        state = self.directory / "state"
        server = f"server.{snapshot.round}.safetensors"
        save_state(state / server, snapshot.server, {}, durable=False)
        new = (state / state_file(number, at) for number, at in snapshot.clients.items() if at == snapshot.round)
        make_durable([state / server, *(path for path in new if path.exists())])  # a node's are on the node
        record_bytes = self._append_record(snapshot.records[-1])
        clients = {str(number): at for number, at in snapshot.clients.items()}
        self._write_manifest(round=snapshot.round, server=server, clients=clients, record_bytes=record_bytes)
        kept = {server, *(state_file(number, at) for number, at in snapshot.clients.items())}
        for path in [path for path in state.iterdir() if path.name not in kept]:
            path.unlink()

    def finish(self) -> None:
        """Note that the run's models and summary are in place."""
        self._write_manifest(finished=True)
        for path in filter(_is_leftover, list(self.directory.iterdir())):
            path.unlink()

    def _append_record(self, record: dict[str, Any]) -> int:
        with open(self.directory / "records.jsonl", "r+b" if self._manifest.get("record_bytes") else "wb") as file:
            file.truncate(self._manifest.get("record_bytes", 0))
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def _read_manifest(self) -> dict[str, Any]:
        path = self.directory / "run.json"
        try:
            manifest = json.loads(path.read_text())
            if manifest["description"]["format"] == _FORMAT:
                return manifest
            problem = f"its format is {manifest['description']['format']}, this version reads {_FORMAT}"
        except FileNotFoundError:
            problem = "there is no run.json"
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"run.json cannot be read: {error}"
        raise CheckpointError(f"run: {self.directory} holds no run to resume, {problem}, choose another --out")

    def _write_manifest(self, **changes: Any) -> None:
        self._manifest.update(changes)
        write_atomic(self.directory / "run.json", json.dumps(self._manifest, indent=1).encode() + b"\n")
