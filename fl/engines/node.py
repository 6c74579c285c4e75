"""What a node of a deployment does when it is asked: the work of engines/work.py, on its own clients and its own files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fl import errors
from fl.algorithms import Algorithm
from fl.checkpoint import describe, profile
from fl.core import Client, Job, state_file
from fl.engines.work import Workplace
from fl.errors import UserError, WorkerError
from fl.storage import Json, Tensors, make_durable


@dataclass(frozen=True)
class Node:
    """The clients that are here, and the directory in which their states and models lie.

    apart: each experiment and client in a folder of its own, named by what decides the client's bits; else the directory is
    one run's, and guarded as such.
    """

    algorithm: Algorithm
    clients: Mapping[int, Client]
    directory: Path
    threads: int
    apart: bool = True

    def introduce(self) -> Json:
        """By client: what a run must know of it, and nothing of its data but its form, its classes' number and a hash."""
        return {
            number: {
                "profile": profile(client),
                "input_shape": list(client.data.train.x.shape[1:]),
                "num_classes": 1 + max(client.data.classes),
            }
            for number, client in self.clients.items()
        }

    def answer(self, order: Json, server: Tensors) -> tuple[Json, dict[int, Tensors]]:
        """Answers by client, and the tensors they send; an answer {"error", "text"} where anything went wrong.

        order: verb "step", "score" or "ship", job, round (index), at: by client the round of its state or null.
        """
        torch.set_num_threads(self.threads)
        given: dict[str, Any] = dict(order["job"])
        given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
        job = Job(**given)
        answers: dict[str, Json] = {}
        messages: dict[int, Tensors] = {}
        try:
            for number, at in ((int(text), at) for text, at in order["at"].items()):
                place = self._place(job, number)
                if order["verb"] == "step":
                    receipt = place.step(number, at, server, order["round"])
                    if receipt.kept:
                        make_durable([place.states / state_file(number, order["round"] + 1)])
                        place.keep(number, at, order["round"] + 1)
                    spent = {"evaluations": receipt.evaluations, "loss": receipt.loss, "kept": receipt.kept}
                    answers[str(number)] = spent
                    if receipt.message is not None:
                        answers[str(number)]["samples"] = receipt.message.samples
                        messages[number] = receipt.message.tensors
                elif order["verb"] == "score":
                    answers[str(number)] = asdict(place.score(number, at, server))
                else:
                    answers[str(number)] = asdict(place.ship(number, at, server))
        except Exception as error:
            return failure(error), {}
        return answers, messages

    def _place(self, job: Job, number: int) -> Workplace:
        client, folder = self.clients[number], self.directory
        if self.apart:
            key = json.dumps(describe(job, self.algorithm, [profile(client)]), sort_keys=True)
            folder = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        place = Workplace(job, self.algorithm, {number: client}, folder)
        place.states.mkdir(parents=True, exist_ok=True)
        place.models.mkdir(exist_ok=True)
        return place


def failure(error: Exception) -> Json:
    """The answer of a node on which something went wrong."""
    return {"error": type(error).__name__, "text": str(error)}


def raised(answer: Json) -> Exception:
    """The exception that a node's answer reports, to be raised on the server."""
    kind = getattr(errors, answer["error"], None)
    if isinstance(kind, type) and issubclass(kind, UserError):
        return kind(answer["text"])
    return WorkerError(f"node: a client's work failed with {answer['error']}: {answer['text']}")
