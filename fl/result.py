"""What a finished run is: its records, one row a client, and its totals, with the table and plot that show them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fl.core import Bits


@dataclass(frozen=True)
class ClientRow:
    """One client at the end of a run.

    accuracy, validation: shares in 0..1, of the model re-loaded from its file.  model_bytes: that file's size.
    evaluations: gradient evaluations the client has spent in the run, fine-tuning included.
    shared_accuracy: of the global model alone on the client's test part; None where there is no such model.
    """

    client: int
    classes: tuple[int, ...]
    architecture: str
    bits: Bits
    train_samples: int
    test_samples: int
    accuracy: float
    validation: float
    evaluations: int
    model_file: str
    model_bytes: int
    shared_accuracy: float | None = None


@dataclass(frozen=True)
class RunResult:
    """A finished run of one algorithm.

    records: one a round, round 0 before training; see report.py for their keys.
    directory: holds run.json, records.jsonl, summary.json and models/.
    """

    algorithm: str
    directory: Path
    records: list[dict[str, Any]]
    clients: list[ClientRow]
    seconds: float

    @property
    def mean_accuracy(self) -> float:
        """Mean of the clients' final test accuracies, in 0..1, each client counting the same."""
        return sum(row.accuracy for row in self.clients) / len(self.clients)

    @property
    def worst_accuracy(self) -> float:
        """The lowest final test accuracy of a client, in 0..1."""
        return min(row.accuracy for row in self.clients)

    @property
    def shared_accuracy(self) -> float | None:
        """The global model's accuracy on the global test set, which is all clients' test parts together; None without one."""
        shares = [(row.shared_accuracy, row.test_samples) for row in self.clients if row.shared_accuracy is not None]
        total = sum(samples for _, samples in shares)
        return sum(share * samples for share, samples in shares) / total if total else None

    @property
    def evaluations(self) -> int:
        """Gradient evaluations of the whole run, by all clients."""
        return sum(row.evaluations for row in self.clients)

    def total(self, key: str) -> int:
        """Sum of a record's number over the rounds: bytes_up, bytes_down, or either as bytes_.._float32."""
        return sum(record[key] for record in self.records)

    def summary(self) -> dict[str, Any]:
        """The result as JSON: totals, and the clients' rows."""
        return {
            "algorithm": self.algorithm,
            "accuracy_mean": self.mean_accuracy,
            "accuracy_worst": self.worst_accuracy,
            "shared_accuracy": self.shared_accuracy,
            "evaluations": self.evaluations,
            "bytes_up": self.total("bytes_up"),
            "bytes_down": self.total("bytes_down"),
            "bytes_up_float32": self.total("bytes_up_float32"),
            "bytes_down_float32": self.total("bytes_down_float32"),
            "seconds": self.seconds,
            "clients": [asdict(row) for row in self.clients],
        }

    def table(self) -> None:
        """Print one line a client."""
        from fl.report import print_clients

        print_clients([self])

    def plot(self, path: str | Path) -> None:
        """Write a picture of accuracy over rounds and of bytes; the suffix decides the format."""
        from fl.report import plot

        plot([self], Path(path))


def scored(records: Sequence[dict[str, Any]]) -> list[int]:
    """Positions of the records whose clients were scored, for pictures: see `scored` in report.py."""
    return [position for position, record in enumerate(records) if record.get("scored", True)]


def row_from_json(row: dict[str, Any]) -> ClientRow:
    """A row as it stands in summary.json."""
    known: Sequence[str] = [field.name for field in fields(ClientRow)]
    values = {key: row[key] for key in known if key in row}  # a field that is newer than the file has its default
    return ClientRow(**{**values, "classes": tuple(values["classes"])})
