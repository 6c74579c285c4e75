"""Accuracy of the models that clients ship."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fl import devices
from fl.core import Client
from fl.data import Part

ROWS = 128  # bounds the memory of a stack's evaluation, whatever the largest test part


@dataclass(frozen=True)
class Score:
    """A client's accuracies, shares in 0..1: on its test part, which is reported, and on its validation part."""

    test: float
    validation: float


@torch.inference_mode()
def accuracy(model: nn.Module, part: Part) -> float:
    """Share of the part's images whose largest logit is their label's. model: in evaluation mode."""
    guesses = model(part.x.to(devices.of(model))).argmax(1)
    return (guesses.cpu() == part.y).sum().item() / len(part)


def score(model: nn.Module, client: Client) -> Score:
    """The model's accuracies on a client's test and validation parts."""
    return Score(accuracy(model, client.data.test), accuracy(model, client.data.val))


@torch.inference_mode()
def stack_scores(model: nn.Module, clients: Sequence[Client]) -> list[Score]:
    """`score` of each client of a stack, whose model is that of all. Images are taken ROWS of each client at a time."""
    images = [torch.cat([client.data.test.x, client.data.val.x]) for client in clients]
    guesses = []
    for start in range(0, max(map(len, images)), ROWS):
        rows = [x[start : start + ROWS] for x in images]
        longest = max(map(len, rows))
        padded = [F.pad(x, [0, 0] * (x.dim() - 1) + [0, longest - len(x)]) for x in rows]
        guesses.append(model(torch.cat(padded, dim=1).to(devices.of(model))).argmax(2))
    found = torch.cat(guesses, dim=1).cpu()  # [K, rows of the longest]
    scores = []
    for k, client in enumerate(clients):
        test, val = client.data.test, client.data.val
        right = found[k, : len(test) + len(val)] == torch.cat([test.y, val.y])
        scores.append(Score(right[: len(test)].sum().item() / len(test), right[len(test) :].sum().item() / len(val)))
    return scores
