"""Accuracy of the models that clients ship."""

from dataclasses import dataclass

import torch
from torch import nn

from fl.core import Client
from fl.data import Part


@dataclass(frozen=True)
class Score:
    """A client's accuracies, shares in 0..1: on its test part, which is reported, and on its validation part."""

    test: float
    validation: float


@torch.inference_mode()
def accuracy(model: nn.Module, part: Part) -> float:
    """Share of the part's images whose largest logit is their label's. model: in evaluation mode."""
    return (model(part.x).argmax(1) == part.y).sum().item() / len(part)


def score(model: nn.Module, client: Client) -> Score:
    """The model's accuracies on a client's test and validation parts."""
    return Score(accuracy(model, client.data.test), accuracy(model, client.data.val))
