"""Ranks, the processes that torchrun starts for one run: what their environment tells them, and how they exchange bytes."""

import atexit
import os
import pickle
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fl import devices
from fl.core import CPU
from fl.errors import UserError, WorkerError

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = timedelta(days=1)  # a rank that dies ends its connections at once, one that trains may take long


def rank(engine: str = "torchrun") -> int:
    """This process's number in a run of that engine. Raises UserError where torchrun and the engine do not go together."""
    given = [name for name in ENVIRONMENT if name in os.environ]
    if engine != "torchrun":
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if "TORCHELASTIC_RUN_ID" in os.environ and size > 1:
            raise UserError(
                f"run: torchrun has started {size} processes, the engine {engine!r} runs in one; add --engine torchrun"
            )
        return 0
    if len(given) < len(ENVIRONMENT):
        raise UserError(
            "run: the engine 'torchrun' needs processes that torchrun starts, this one is not; "
            "the command is `torchrun --nproc-per-node 2 -m fl run CONFIG --engine torchrun`"
        )
    return int(os.environ["RANK"])


def speaks() -> bool:
    """Whether this process says what is wrong before the ranks have met: one does on each machine, where all fail alike."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def settle(device: str) -> None:
    """Make this rank's GPU torch's current one, where it is to train on a GPU. Raises ValueError, one sentence."""
    if device not in (CPU, devices.AUTO, "cuda"):
        raise ValueError(
            f"torchrun: device must be 'cpu', 'cuda' or 'auto', for each rank takes the GPU of its own number, got {device!r}"
        )
    if device == CPU or not torch.cuda.is_available():
        return
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > gpus:
        raise ValueError(
            f"torchrun: each rank needs a GPU of its own, got {ranks} ranks and {gpus} GPUs; use --nproc-per-node {gpus}"
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def stoppable() -> Iterator[None]:
    """On rank 0: the SIGTERM that torchrun sends when another rank has ended is Ctrl-C, so that the run says where it stands."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending, and has its own sentence to say
        raise
    signal.signal(signal.SIGTERM, before)


# -- the ranks together -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """This process among the others, which are trusted: what they exchange is pickled.

    device: whose memory the bytes pass through.
    """

    rank: int
    size: int
    device: str

    def tell(self, thing: Any = None) -> Any:
        """Rank 0's thing, on every rank."""
        content = pickle.dumps(thing) if self.rank == 0 else b""
        with _others():
            length = torch.tensor([len(content)], device=self.device)
            dist.broadcast(length, 0)
            buffer = self._buffer(content, int(length))
            dist.broadcast(buffer, 0)
            return thing if self.rank == 0 else pickle.loads(buffer.cpu().numpy().data)

    def collect(self, thing: Any) -> list[Any]:
        """Every rank's thing, in the order of ranks, on rank 0; the others get none."""
        content = b"" if self.rank == 0 else pickle.dumps(thing)
        with _others():
            own = torch.tensor([len(content)], device=self.device)
            all_lengths = [torch.empty_like(own) for _ in range(self.size)]
            dist.all_gather(all_lengths, own)
            lengths = torch.cat(all_lengths).tolist()
            buffer = self._buffer(content, max(1, *lengths))
            buffers = [torch.empty_like(buffer) for _ in range(self.size)] if self.rank == 0 else None
            dist.gather(buffer, buffers, 0)
        if buffers is None:
            return []
        sent = zip(buffers[1:], lengths[1:], strict=True)
        return [thing, *(pickle.loads(buffer[:length].cpu().numpy().data) for buffer, length in sent)]

    def _buffer(self, content: bytes, length: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(content.ljust(length, b"\0")), dtype=torch.uint8).to(self.device)


@contextmanager
def _others() -> Iterator[None]:
    """What the others' end looks like from here."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[\S+\] ", "", str(error)).splitlines()[0].split(". ")[0]  # without gloo's file and advice
        raise WorkerError(
            f"torchrun: another rank has ended or cannot be reached ({reason}), continue with --resume"
        ) from error


def join(device: str) -> Ranks:
    """Meet the others, once in a process's life, and for all of it. device: of the run."""
    if not dist.is_initialized():
        rank()
        if not dist.is_available():
            raise UserError("run: the engine 'torchrun' needs a torch with torch.distributed, this one is without it")
        with _others():
            store, number, size = next(dist.rendezvous("env://", timeout=PATIENCE))
            # torchrun keeps its store when it restarts ranks, and the addresses of the dead in it
            fresh = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            backend = "gloo" if device == CPU else "nccl"
            dist.init_process_group(backend, store=fresh, rank=number, world_size=size, timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size(), CPU if dist.get_backend() == "gloo" else "cuda")
