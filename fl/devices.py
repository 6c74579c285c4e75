"""The device that models train on. A visit takes a client's state and the server's tensors there, and back: here, nowhere else.

Data, draws, files, messages and whatever the server does stay with the CPU: a run on another device has the same batches and
differs by rounding only.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fl.core import CPU, Client, ClientState, Job, Update
from fl.storage import Tensors

AUTO = "auto"  # the GPU where torch finds one, else the CPU


def find(name: str) -> str:
    """The device that a name stands for, "auto" resolved. Raises ValueError, one sentence, where torch has none of that name."""
    if name == AUTO:
        return "cuda" if torch.cuda.is_available() else CPU
    if name == CPU:
        return name
    try:
        torch.zeros(1, device=name).item()  # what is never computed, as on "meta", has no values
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        wanted = "Federation: device must be 'cpu', 'auto' or a device that torch has here"
        raise ValueError(f"{wanted}, got {name!r}: {reason}") from error
    return name


def title(name: str) -> str:
    """A device's name, and which GPU it is."""
    return f"{name} ({torch.cuda.get_device_name(name)})" if torch.device(name).type == "cuda" else name


def of(model: nn.Module) -> torch.device:
    """The device of a model, whose tensors are all on one."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    raise ValueError("of: the model must have a parameter or a buffer, it has none")


def moved(tensors: Tensors, device: str) -> Tensors:
    """Tensors by name, on the device; those that are there are not copied."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def visit(work: Callable[..., Any], job: Job, client: Client, state: ClientState, server: Tensors, *rest: Any) -> Any:
    """work(job, client, state, server, *rest) with state and server on the run's device; an Update it returns is brought back."""
    if job.device == CPU:
        return work(job, client, state, server, *rest)
    there = replace(state, tensors=moved(state.tensors, job.device))
    with _exact(job.device):
        result = work(job, client, there, moved(server, job.device), *rest)
    if not isinstance(result, Update):
        return result
    message = result.message
    return replace(
        result,
        state=state if result.state is there else replace(result.state, tensors=moved(result.state.tensors, CPU)),
        message=None if message is None else replace(message, tensors=moved(message.tensors, CPU)),
    )


def _exact(device: str) -> AbstractContextManager[None]:
    """float32 as on the CPU, and the same bits again: cuDNN does not round to TF32, nor add in the order of arrival."""
    if torch.device(device).type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False)
