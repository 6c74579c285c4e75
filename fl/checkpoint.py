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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import qupedkern as qk
from fl import devices
from fl.algorithms import Algorithm
from fl.core import CPU, Client, Job, state_file
from fl.errors import CheckpointError
from fl.lock import alone
from fl.manifest import FORMAT, read_manifest, server_file
from fl.storage import Json, Tensors, check_state, load_state, make_durable, save_state, write_atomic


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

    profiles: of the clients, in order of their numbers.  Of the device its type counts; one that is not named is the CPU.
    """
    given = asdict(job)
    device = torch.device(given.pop("device")).type
    return json.loads(
        json.dumps(
            {
                "format": FORMAT,
                "algorithm": algorithm.name,
                "parameters": asdict(algorithm),  # type: ignore[call-overload]  # the base is none, every subclass a dataclass
                "job": given,
                "clients": list(profiles),
                **({} if device == CPU else {"device": device}),
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


def _built_with(device: str) -> str:
    """The torch, the kernels and the GPU that compute: together with the thread count, what a run's bits depend on."""
    example = torch.zeros(1, device=device), torch.zeros(2, device=device)
    chosen = qk.explain("soft_quantize", *example, 1.0).backend
    where = "" if device == CPU else f", {devices.title(device)}"
    return f"torch {torch.__version__}, {chosen} {qk.backends().descriptions[chosen]}{where}"


def _is_leftover(path: Path) -> bool:
    """Whether the file is an atomic write's temporary that a killed process left behind."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def is_untouched(directory: Path) -> bool:
    """Whether nothing is in a run's directory but what a process leaves that is killed before its first manifest."""
    return directory.is_dir() and all(_is_leftover(path) for path in directory.iterdir())


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
        if not self.directory.exists() or is_untouched(self.directory):
            return False
        if not resume:
            raise CheckpointError(f"run: {self.directory} is not empty, continue with --resume or choose another --out")
        manifest = read_manifest(self.directory)
        known = {"device": CPU}
        difference = _difference(known | manifest["description"], known | self._description)
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
    def _built_with(self) -> str:
        return _built_with(self._description.get("device", CPU))

    @property
    def finished(self) -> bool:
        """Whether the run's models and summary have been written."""
        return bool(self._manifest.get("finished"))

    def start(self, threads: int) -> None:
        """Make the directory and its first manifest, in which no round is done: whose directory it is, and for what."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._manifest = {"description": self._description, "clients": {}}
        self._write_manifest(threads=threads, built_with=self._built_with)
        (self.directory / "state").mkdir(exist_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from running in the directory, which is made where it is missing; after `check`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with alone(self.directory):
            if (read_manifest(self.directory) if (self.directory / "run.json").exists() else {}) != self._manifest:
                raise CheckpointError(f"run: another process has just run in {self.directory}, continue with --resume")
            yield

    def load(self) -> Snapshot:
        """The last completed round; what a dying process left behind it is dropped, once all that is kept has been read.

        Raises CheckpointError where a file of the checkpoint is missing or damaged, and leaves them all alone.
        """
        manifest = self._manifest
        if manifest["built_with"] != self._built_with:
            warnings.warn(
                f"run: started with {manifest['built_with']} and resumed with {self._built_with}, "
                f"its results need not equal those of an uninterrupted run",
                stacklevel=2,
            )
        records = self._read_records()
        server, _ = load_state(self.directory / "state" / manifest["server"])
        clients = {int(number): at for number, at in manifest["clients"].items()}
        self._check_states(clients)
        with open(self.directory / "records.jsonl", "r+b") as file:
            file.truncate(manifest["record_bytes"])
        return Snapshot(manifest["round"], server, clients, records)

    def save(self, snapshot: Snapshot) -> None:
        """Write a completed round: the server, its record, then the manifest. The clients' states are in their files."""
        state = self.directory / "state"
        server = server_file(snapshot.round)
        save_state(state / server, snapshot.server, {}, durable=False)
        new = (state / state_file(number, at) for number, at in snapshot.clients.items() if at == snapshot.round)
        make_durable([state / server, *(path for path in new if path.exists())])  # a node's are on the node
        record_bytes = self._append_record(snapshot.records[-1])
        clients = {str(number): at for number, at in snapshot.clients.items()}
        self._write_manifest(round=snapshot.round, server=server, clients=clients, record_bytes=record_bytes)
        self._tidy()

    def finish(self) -> None:
        """Note that the run's models and summary are in place."""
        self._write_manifest(finished=True)
        self._tidy()

    def _tidy(self) -> None:
        """Delete what the manifest does not name: earlier rounds' files, and what killed processes have left."""
        state = self.directory / "state"
        kept = {self._manifest["server"]}
        kept |= {state_file(int(number), at) for number, at in self._manifest["clients"].items()}
        old = [path for path in state.iterdir() if path.name not in kept]
        for path in [*old, *filter(_is_leftover, self.directory.iterdir())]:
            path.unlink(missing_ok=True)  # a killed run's last worker may be renaming it

    def _append_record(self, record: dict[str, Any]) -> int:
        with open(self.directory / "records.jsonl", "r+b" if self._manifest.get("record_bytes") else "wb") as file:
            file.truncate(self._manifest.get("record_bytes", 0))
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def _read_records(self) -> list[dict[str, Any]]:
        path, length, lines = (
            self.directory / "records.jsonl",
            self._manifest["record_bytes"],
            self._manifest["round"] + 1,
        )
        try:
            with open(path, "rb") as file:
                content = file.read(length)
            problem = f"it must hold {length} bytes, got {len(content)}"
            if len(content) == length:
                records = [json.loads(line) for line in content.splitlines()]
                if [record["round"] for record in records] == list(range(lines)):
                    return records
                problem = f"it must hold a line for each of the rounds 0 to {lines - 1}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"run: {path} is damaged ({problem}), start again with another --out")

    def _check_states(self, clients: Mapping[int, int]) -> None:
        """Refuse a client's state that is missing or cut short; where none is here, they are on a deployment's nodes."""
        paths = [self.directory / "state" / state_file(number, at) for number, at in clients.items()]
        here = [path for path in paths if path.exists()]
        for path in paths if here else []:
            check_state(path)

    def _write_manifest(self, **changes: Any) -> None:
        self._manifest.update(changes)
        write_atomic(self.directory / "run.json", json.dumps(self._manifest).encode() + b"\n")
