"""What a federation is made of: plain data, and pure functions on it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fl import data
from fl.seeds import torch_generator
from fl.storage import Json, Tensors, load_state, save_state

Bits = int | str  # 1..8, or "ternary", or "float" for a model that is not quantized
GATHERED = 1 << 26  # bytes of images that a stack holds ready for its next steps
Groups = int | str  # "tensor", "channel", or a block length
CPU = "cpu"


@dataclass(frozen=True)
class Client:
    """Who takes part: a client's number, what its device can hold, and its data.

    bits: 1..8, "ternary" or "float".  architecture: a key of models.ARCHITECTURES.
    groups: which weights share a row of centers, "tensor", "channel" or a block length, as in qk.quantize_.
    speed: how fast it trains, for deadlines.
    """

    id: int
    architecture: str
    bits: Bits
    data: data.ClientData
    groups: Groups = "tensor"
    speed: float = 1.0

    @property
    def size(self) -> int:
        """How many clients' models lie side by side in this one's."""
        return 1


@dataclass(frozen=True)
class Stack(Client):
    """Clients of one kind as one client, who trains their models side by side: a client step need not know.

    Its model takes images [B, K C, height, width], the clients' channels side by side, and gives logits [K, B, classes];
    its losses are [K]; parameters and states are the clients', joined along the first dimension (fl/stack.py).
    members: K >= 2 clients, alike in architecture, bits and groups; only they have data.
    """

    members: tuple[Client, ...] = ()

    @property
    def size(self) -> int:
        return len(self.members)


@dataclass(frozen=True)
class Job:
    """What every step of a run may read: the run's size, its seed, and the shape of the task.

    rounds: number of rounds.  sample: share of the clients drawn a round, 0 < sample <= 1.
    architecture: the global model's.  evaluations: gradient evaluations a drawn client may spend in a round, or None
    where the algorithm's own local_steps decides.  score_every: rounds from one scoring of the clients to the next.
    device: torch's name of where models train; see devices.py.
    """

    rounds: int
    sample: float
    seed: int
    architecture: str
    input_shape: tuple[int, int, int]
    num_classes: int
    evaluations: int | None = None
    augment: str = "none"
    dropout: float = 0.0
    deadline: float | None = None
    quorum: float = 0.0
    speeds: tuple[float, ...] = ()
    score_every: int = 1
    device: str = CPU


@dataclass(frozen=True)
class ClientState:
    """All that a client keeps between rounds: tensors by name, and JSON-able scalars. One safetensors file."""

    tensors: Tensors
    scalars: Json

    def save(self, path: Path) -> None:
        """Write the state as one safetensors file, atomically; storage.make_durable makes it outlast a power cut."""
        save_state(path, self.tensors, self.scalars, durable=False)

    @classmethod
    def load(cls, path: Path) -> "ClientState":
        """Read what save wrote."""
        return cls(*load_state(path))


def state_file(number: int, round_number: int) -> str:
    """The name of the file that holds a client's state after that round."""
    return f"client_{number:03d}.{round_number}.safetensors"


@dataclass(frozen=True)
class Message:
    """What travels from a client to the server. samples: the client's training images, for a weighted mean."""

    tensors: Tensors
    samples: int


@dataclass(frozen=True)
class Update:
    """What a client step returns: the client's new state, its message (None: nothing travels), and what it spent.

    evaluations: gradients of a loss on a batch that were taken.
    loss: mean training loss over the local steps, None where there were none.  each: of a Stack, every member's.
    """

    state: ClientState
    message: Message | None
    evaluations: int
    loss: float | None
    each: tuple[float, ...] = ()


def make_clients(
    dataset: data.Dataset,
    equipment: Sequence[tuple[str, Bits] | tuple[str, Bits, Groups, float]],
    classes_per_client: int | tuple[int, int] | None = None,
    seed: int = 0,
    fractions: tuple[float, float, float] = data.FRACTIONS,
    plan: data.Plan | None = None,
) -> list[Client]:
    """Clients over a data set that is split and partitioned by `seed`.

    equipment: (architecture, bits) or (architecture, bits, groups, speed) of each client; its length is their number.
    plan: how the data is cut; without one, classes_per_client random classes each.
    """
    if plan is None:
        if classes_per_client is None:
            raise ValueError("make_clients: needs classes_per_client or a plan, got neither")
        plan = data.Plan(classes_per_client=classes_per_client, fractions=fractions)
    held = data.clients_data(dataset, plan, len(equipment), seed)
    return [
        Client(number, device[0], device[1], part, *device[2:])
        for number, (device, part) in enumerate(zip(equipment, held, strict=True))
    ]


def sample_clients(seed: int, round_number: int, count: int, fraction: float) -> list[int]:
    """The clients of a round, ascending: round(fraction * count) of them, at least one, without replacement."""
    drawn = max(1, round(fraction * count))
    order = torch.randperm(count, generator=torch_generator(seed, "sample", round_number))
    return sorted(order[:drawn].tolist())


def batches(samples: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` index tensors of batch_size (or all, where there are fewer samples), through reshuffled passes.

    A batch lies within one pass, so holds no sample twice; what does not fill a batch at a pass's end is left to the
    next shuffle.
    """
    size = min(batch_size, samples)
    while True:
        order = torch.randperm(samples, generator=generator)
        for start in range(0, samples - size + 1, size):
            if steps == 0:
                return
            steps -= 1
            yield order[start : start + size]


def training_batches(
    job: Job, client: Client, batch_size: int, steps: int, round_index: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches (x, y) of a client's training images in a round, by the run's seed, round and client, on its device.

    Of a Stack: x [B, K C, height, width] and y [K, B], of what each member draws by itself.
    """
    for x, y in _batches(job, client, batch_size, steps, round_index):
        yield x.to(job.device), y.to(job.device)


def _batches(
    job: Job, client: Client, batch_size: int, steps: int, round_index: int
) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(client, Stack) and job.augment == "none":
        yield from _stacked_batches(job, client, batch_size, steps, round_index)
    elif isinstance(client, Stack):
        own = [_batches(job, member, batch_size, steps, round_index) for member in client.members]
        for drawn in zip(*own, strict=True):
            yield torch.cat([x for x, _ in drawn], dim=1), torch.stack([y for _, y in drawn])
    else:
        part, changes = client.data.train, torch_generator(job.seed, "augment", round_index, client.id)
        for index in _drawn(job, client, batch_size, steps, round_index):
            x = part.x[index]
            yield data.flip_crop(x, changes) if job.augment == "flip_crop" else x, part.y[index]


def _drawn(job: Job, client: Client, batch_size: int, steps: int, round_index: int) -> Iterator[Tensor]:
    random = torch_generator(job.seed, "batches", round_index, client.id)
    return batches(len(client.data.train), batch_size, steps, random)


def _stacked_batches(
    job: Job, stack: Stack, batch_size: int, steps: int, round_index: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some steps' images of a client are gathered at a time: one by one they take as long as a small network's step."""
    parts = [member.data.train for member in stack.members]
    drawn = [torch.stack(list(_drawn(job, member, batch_size, steps, round_index))) for member in stack.members]
    step_bytes = sum(part.x[:1].nbytes for part in parts) * drawn[0].shape[1]
    together = max(1, GATHERED // max(1, step_bytes))
    for start in range(0, steps, together):
        indices = [index[start : start + together] for index in drawn]  # each [steps, B]
        x = torch.stack([part.x[index] for part, index in zip(parts, indices, strict=True)], dim=2)
        y = torch.stack([part.y[index] for part, index in zip(parts, indices, strict=True)], dim=1)
        for images, labels in zip(x, y, strict=True):
            yield images.flatten(1, 2), labels


def aggregate(messages: Mapping[int, Message], weighted: bool = False) -> Tensors:
    """The mean of the messages' tensors, summed in float64 in the order of client numbers.

    So the order of arrival does not matter, and equal messages give back exactly themselves.  weighted: by samples,
    else each message counts the same.  Integer tensors (batch norm's step counter) take the largest value.
    """
    if not messages:
        raise ValueError("aggregate: needs at least one message, got none")
    order = sorted(messages)
    shares = [messages[number].samples if weighted else 1 for number in order]
    first = messages[order[0]].tensors
    floats = [name for name, tensor in first.items() if tensor.is_floating_point()]
    totals = [torch.zeros_like(first[name], dtype=torch.float64) for name in floats]
    wide = [torch.empty_like(total) for total in totals]
    for number, share in (
        zip(order, shares, strict=True) if floats else ()
    ):  # all tensors of a message in two calls: most are small
        torch._foreach_copy_(wide, [messages[number].tensors[name] for name in floats])
        torch._foreach_add_(totals, wide, alpha=share)
    means = {name: (total / sum(shares)).to(first[name].dtype) for name, total in zip(floats, totals, strict=True)}
    counts = {
        name: torch.stack([messages[number].tensors[name] for number in order]).amax(0)
        for name in first
        if name not in means
    }
    return {name: means[name] if name in means else counts[name] for name in first}


def payload_bytes(tensors: Tensors) -> int:
    """Bytes of the tensors' values as they are: what a message costs on the wire, without framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def float32_bytes(tensors: Tensors) -> int:
    """payload_bytes of the same values with every float in 32 bits."""
    return sum(
        tensor.numel() * (4 if tensor.is_floating_point() else tensor.element_size()) for tensor in tensors.values()
    )
