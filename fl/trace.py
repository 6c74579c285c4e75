"""What a run of the command line writes down while it goes on, beside its records: how weights come to lie on centers.

centers.jsonl has a line for each look at a quantized client after a round in which it took part, at most LOOKS a round:
  round, client, device   when, who, and its architecture and bits
  share                   of its quantized weights that are within NEAR gaps of their center, 0..1, see share_on_centers
  centers, largest        of the watched clients, the first of each kind of device: by layer its first row of centers, and
                          the name of the layer with the most weights

States are read back from their files, so no engine does anything for it; where the states lie elsewhere there is no line.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qupedkern as qk
from fl.core import Client, ClientState, state_file
from fl.report import device_name
from fl.storage import Json, Tensors, write_atomic

LOOKS = 16
NEAR = 0.01
_FILE = "centers.jsonl"
_PREFIX, _CENTERS, _WEIGHT = "model.", ".centers", ".weight"


@dataclass
class Trace:
    """Writes the file of one run; to be called after each round, as Federation.run's on_round is.

    On its first call, with the round that a run was found at or starts from, later lines of an earlier process are dropped.
    """

    directory: Path
    clients: Sequence[Client]
    _started: bool = field(default=False, init=False)

    def __call__(self, rounds: int, record: dict[str, Any]) -> None:
        if not self._started:
            kept = [line for line in read_trace(self.directory) if line["round"] < rounds]
            write_atomic(self.directory / _FILE, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._started = True
        with open(self.directory / _FILE, "a") as file:
            for line in self._look(rounds, record):
                file.write(json.dumps(line) + "\n")

    def _look(self, rounds: int, record: dict[str, Any]) -> list[Json]:
        devices: dict[str, int] = {}
        for client in self.clients:
            devices.setdefault(device_name(client.architecture, client.bits), client.id)
        worked = [number for number in record["drawn"] if number not in record["failed"]]
        watched = [number for number in worked if number in devices.values()]
        others = [number for number in worked if number not in watched]
        lines = []
        for number in sorted([*watched, *others][:LOOKS]):
            path = self.directory / "state" / state_file(number, rounds)
            if self.clients[number].bits == "float" or not path.exists():
                continue
            tensors = ClientState.load(path).tensors
            share = share_on_centers(tensors)
            if share is None:
                continue
            device = device_name(self.clients[number].architecture, self.clients[number].bits)
            line = {"round": rounds, "client": number, "device": device, "share": share}
            if number in watched:
                largest = max(_layers(tensors), key=lambda name: tensors[_PREFIX + name + _WEIGHT].numel())
                line |= {"centers": first_rows(tensors), "largest": largest}
            lines.append(line)
        return lines


def share_on_centers(tensors: Tensors) -> float | None:
    """Of a state's quantized weights the share with |x - Q_c(x)| <= NEAR (c_m - c_1) / (m - 1); None where there is none.

    Not those that are equal: after every step the centers move a little away from the weights that have just come to lie on them.
    Of weights spread evenly it is 2 NEAR; once they are frozen it is 1.
    """
    on = total = 0
    for name in _layers(tensors):
        weight, centers = tensors[_PREFIX + name + _WEIGHT], tensors[_PREFIX + name + _CENTERS]
        gap = (centers[..., -1:] - centers[..., :1]) / (centers.shape[-1] - 1)  # [1] or [G, 1]
        away = (weight - qk.hard_quantize(weight, centers)).abs().view(len(gap), -1)
        on += int((away <= NEAR * gap.view(-1, 1)).sum())
        total += weight.numel()
    return on / total if total else None


def first_rows(tensors: Tensors) -> dict[str, list[float]]:
    """By quantized layer its centers, of several rows the first."""
    centers = {name: tensors[_PREFIX + name + _CENTERS] for name in _layers(tensors)}
    return {name: (row if row.dim() == 1 else row[0]).tolist() for name, row in centers.items()}


def _layers(tensors: Tensors) -> list[str]:
    """In alphabetical order: a file gives its tensors in any."""
    names = [name for name in tensors if name.startswith(_PREFIX) and name.endswith(_CENTERS)]
    return sorted(name.removeprefix(_PREFIX).removesuffix(_CENTERS) for name in names)


def read_trace(directory: Path) -> list[Json]:
    """The lines of a run's file, up to the first that a killed process has left half; none where there is no file."""
    path = directory / _FILE
    lines: list[Json] = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
