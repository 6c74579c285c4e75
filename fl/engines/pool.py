"""Worker processes that stay for the whole run, each with its own torch; the bits of the serial engine.

A worker does one client at a time and keeps nothing that a run could miss: data and global model are read from memory that
all share, a client's state from its file, and its new state goes to a new file. So the work of a worker that dies is done
again by another, to the same bits. Workers end when the engine is closed, and when the process that started them dies.
"""

import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fl.algorithms import Algorithm
from fl.core import Client, Job
from fl.engines.loop import At, Dispatcher
from fl.engines.shared import Layout, join, part, remove, share, shared_directory
from fl.engines.work import Workplace
from fl.errors import WorkerError
from fl.storage import Tensors

DEATHS = 3  # of workers over the same client, after which the client, and not the machine, is to blame
STARTED = "started"  # a worker's first word

Task = tuple[str, int, At, int]  # what to do, client, where its state is, round index


@dataclass(frozen=True)
class Brief:
    """All that a worker is started with; it is pickled, so the tensors are named by where they lie."""

    job: Job
    algorithm: Algorithm
    directory: Path
    threads: int
    devices: list[Client]  # without data
    data: Layout
    server: Layout
    shared: Path


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- in a worker ------------------------------------------------------------------------------------------------------


def work(pipe: connection.Connection, brief: Brief) -> None:
    """A worker's life: one answer to each task, until the other end of the pipe is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(brief.threads)
    tensors, server = brief.data.open(), brief.server.open()
    place = Workplace(brief.job, brief.algorithm, join(brief.devices, tensors), brief.directory)
    pipe.send_bytes(pickle.dumps((STARTED, None)))
    try:
        while True:
            verb, number, at, round_index = pickle.loads(pipe.recv_bytes())
            try:
                reply = pickle.dumps((True, place.answer(verb, number, at, server, round_index)))
            except Exception as error:
                reply = pickle.dumps((False, error))
            pipe.send_bytes(reply)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone, and may have had no time to tidy up
        remove(brief.shared)


# -- in the process that runs the loop --------------------------------------------------------------------------------


@dataclass
class Worker:
    """One process, and what it is doing: None before its first word and between two tasks."""

    process: BaseProcess
    pipe: connection.Connection
    started: bool = False
    task: Task | None = None


@dataclass
class Pool(Dispatcher):
    """An engine of `count` workers; make it by `open_pool`."""

    brief: Brief
    count: int
    workers: list[Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._server = self.brief.server.open()
        self._deaths: dict[int, int] = {}
        self._false_starts = 0

    def _do(self, verb: str, clients: Mapping[int, At], server: Tensors, round_index: int = 0) -> dict[int, Any]:
        """Every client's answer, in the order given. Raises what a worker raised, or WorkerError where they keep dying."""
        for name, shared in self._server.items():  # nobody reads it now: no task is under way
            shared.copy_(server[name])
        waiting: deque[Task] = deque((verb, number, at, round_index) for number, at in clients.items())
        answers: dict[int, Any] = {}
        while len(answers) < len(clients):
            while len(self.workers) < self.count:
                self.workers.append(self._start())
            for worker in self.workers:
                if worker.started and worker.task is None and waiting:
                    worker.task = waiting.popleft()
                    self._send(worker, worker.task)
            busy = [worker for worker in self.workers if worker.task is not None or not worker.started]
            pipes = {worker.pipe: worker for worker in busy}
            for ready in connection.wait(list(pipes)):  # a dead worker's pipe is ready too: it has ended
                worker = pipes[ready]  # type: ignore[index]  # wait's own type allows sockets
                try:
                    done, answer = pickle.loads(worker.pipe.recv_bytes())
                except (EOFError, OSError, pickle.UnpicklingError):
                    waiting.extendleft(self._bury(worker))
                    continue
                self._false_starts = 0
                if done == STARTED:
                    worker.started = True
                    continue
                if not done:
                    raise answer
                assert worker.task is not None
                answers[worker.task[1]] = answer
                worker.task = None
        return {number: answers[number] for number in clients}

    def _send(self, worker: Worker, task: Task) -> None:
        with suppress(OSError):  # it has died since its last answer; its pipe says so when it is read
            worker.pipe.send_bytes(pickle.dumps(task))

    def _start(self) -> Worker:
        context = multiprocessing.get_context("spawn")  # fork would copy torch's threads half-way
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, self.brief), daemon=True, name="qupedkern-worker")
        process.start()
        theirs.close()  # so that the worker's death ends the pipe
        return Worker(process, ours)

    def _bury(self, worker: Worker) -> list[Task]:
        """Take a dead worker out; returns the task it leaves. Raises WorkerError where replacing it would not help."""
        self.workers.remove(worker)
        worker.pipe.close()
        worker.process.join()
        how = _how(worker.process.exitcode)
        if not worker.started:
            self._false_starts += 1
            if self._false_starts >= DEATHS:
                raise WorkerError(
                    f"pool: a worker {how} before it could start, {DEATHS} times; use the engine 'serial'"
                )
        if worker.task is None:
            return []
        number = worker.task[1]
        self._deaths[number] = self._deaths.get(number, 0) + 1
        if self._deaths[number] >= DEATHS:
            raise WorkerError(
                f"pool: a worker {how} while it worked on client {number}, {DEATHS} times; "
                f"use fewer workers where memory is short, then continue with --resume"
            )
        return [worker.task]

    def close(self) -> None:
        """End the workers; what they were doing is lost."""
        for worker in self.workers:
            worker.pipe.close()  # a worker without a task reads the end and leaves
        for worker in self.workers:
            if worker.task is not None or not worker.started:
                worker.process.kill()
            worker.process.join()


def _how(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"was killed by signal {-exitcode}"
    return f"ended with exit code {exitcode}"


@contextmanager
def open_pool(
    job: Job, algorithm: Algorithm, clients: Sequence[Client], directory: Path, threads: int, count: int | None
) -> Iterator[Pool]:
    """A pool over these clients. count: workers, None: one for each processor, but no more than there is work for."""
    drawn = max(1, round(job.sample * len(clients)))
    count = min(cores(), drawn) if count is None else count
    shared = shared_directory()
    try:
        devices, data = part(clients)
        brief = Brief(
            job=job,
            algorithm=algorithm,
            directory=directory.resolve(),
            threads=threads,
            devices=devices,
            data=share(shared / "data", data),
            server=share(shared / "server", algorithm.broadcast(job, algorithm.start_server(job))),
            shared=shared,
        )
        pool = Pool(brief, count)
        try:
            yield pool
        finally:
            pool.close()
    finally:
        remove(shared)
