"""Packed messages: an algorithm whose global model travels as codes of a few bits and their centers.

Up: the difference of a client's message to what it received, each weight quantized to 2^bits centers of its own, and
packed: exact k-means up to 4 bits, an even grid from there on, where k-means takes long and gains little. What
quantizing took away is added to the client's next difference (error feedback, Seide et al. 2014; Karimireddy et al. 2019,
arXiv:1901.09847), so that the sum of what is sent follows the sum of what was meant.
Down: the global model itself, quantized alike. The server goes on from its own float32 values and adds the differences to
them, so a difference smaller than a download's steps is not lost.
Biases, norms, buffers, and weights too small to gain, travel as they are. Personal models never travel, packed or not.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

import qupedkern as qk
from fl.algorithms import Algorithm
from fl.core import Bits, Client, ClientState, Job, Message, Update
from fl.storage import Tensors

KMEANS_BITS = 4
_RESIDUAL = "wire."  # before the names of a state's tensors that are error feedback


def is_packed(tensor: Tensor, bits: int) -> bool:
    """Whether a tensor is quantized on the wire: a weight whose codes and centers take fewer bytes than it."""
    packed = -(-tensor.numel() * bits // 8) + 4 * 2**bits
    return tensor.is_floating_point() and tensor.dim() >= 2 and packed < 4 * tensor.numel()


def encode(tensors: Tensors, bits: int) -> Tensors:
    """<name>.packed (uint8) and <name>.centers (float32) for each tensor that is_packed says, the others as they are."""
    payload: Tensors = {}
    for name, tensor in tensors.items():
        if is_packed(tensor, bits):
            x = tensor.detach().float()
            centers = qk.init_centers(x, 2**bits, method="kmeans" if bits <= KMEANS_BITS else "linspace")
            payload[name + ".packed"] = qk.pack_codes(qk.assign(x, centers), bits)
            payload[name + ".centers"] = centers
        else:
            payload[name] = tensor
    return payload


def decode(payload: Tensors, like: Tensors, bits: int) -> Tensors:
    """What encode's payload stands for. like: tensors of the names, shapes and types that were encoded."""
    values: Tensors = {}
    for name, tensor in like.items():
        if is_packed(tensor, bits):
            shape = list(tensor.shape)
            value = qk.dequantize_packed(payload[name + ".packed"], payload[name + ".centers"], bits, shape)
            values[name] = value.to(tensor.dtype)
        else:
            values[name] = payload[name]
    return values


@dataclass(frozen=True)
class Wire(Algorithm):
    """Another algorithm with packed messages.

    up_bits, down_bits: 1..8, of uploads and downloads; None: as they are.  error_feedback: of uploads.
    """

    inner: Algorithm
    up_bits: int | None = None
    down_bits: int | None = None
    error_feedback: bool = True

    def __post_init__(self) -> None:
        for key, bits in (("up_bits", self.up_bits), ("down_bits", self.down_bits)):
            if bits is not None and not 1 <= bits <= 8:
                raise ValueError(f"wire: {key} must be between 1 and 8, got {bits}")

    @property
    def name(self) -> str:  # type: ignore[override]  # the inner algorithm's, not one of the class
        return self.inner.name

    @property
    def personal(self) -> bool:
        return self.inner.personal

    def check(self, job: Job, clients: Sequence[Client]) -> None:
        self.inner.check(job, clients)

    def start_server(self, job: Job) -> Tensors:
        return self.inner.start_server(job)

    def broadcast(self, job: Job, server: Tensors) -> Tensors:
        return server if self.down_bits is None else encode(server, self.down_bits)

    def start_client(self, job: Job, client: Client) -> ClientState:
        return self.inner.start_client(job, client)

    def client_step(self, job: Job, client: Client, state: ClientState, broadcast: Tensors, round_index: int) -> Update:
        received = self._received(job, broadcast)
        update = self.inner.client_step(job, client, _without_residual(state), received, round_index)
        return self._sent(update, state, received)

    @property
    def stackable(self) -> bool:  # type: ignore[override]  # as name
        return self.inner.stackable

    def kind(self, client: Client, state: ClientState) -> Hashable:
        return self.inner.kind(client, _without_residual(state))

    @property
    def stackable_model(self) -> bool:
        return False  # a download is unpacked, and an upload packed, client by client

    def stack_step(
        self, job: Job, clients: Sequence[Client], states: Sequence[ClientState], broadcast: Tensors, round_index: int
    ) -> list[Update]:
        received = self._received(job, broadcast)
        plain = [_without_residual(state) for state in states]
        updates = self.inner.stack_step(job, clients, plain, received, round_index)
        return [self._sent(update, state, received) for update, state in zip(updates, states, strict=True)]

    def _sent(self, update: Update, state: ClientState, received: Tensors) -> Update:
        """A client's update with its message packed, and what that took away kept for the next. state: before the step."""
        if update.message is None or self.up_bits is None:
            return update
        wanted = {name: _difference(tensor, received[name]) for name, tensor in update.message.tensors.items()}
        for name, tensor in state.tensors.items():
            if name.startswith(_RESIDUAL):
                wanted[name[len(_RESIDUAL) :]] += tensor
        payload = encode(wanted, self.up_bits)
        kept = dict(update.state.tensors)
        if self.error_feedback:
            sent = decode(payload, wanted, self.up_bits)
            for name, tensor in wanted.items():
                if is_packed(tensor, self.up_bits):
                    kept[_RESIDUAL + name] = tensor - sent[name]
        return replace(
            update, state=replace(update.state, tensors=kept), message=replace(update.message, tensors=payload)
        )

    def server_step(self, job: Job, server: Tensors, messages: Mapping[int, Message]) -> Tensors:
        if self.up_bits is None:
            return self.inner.server_step(job, server, messages)
        plain = {}
        for number, message in messages.items():
            sent = decode(message.tensors, server, self.up_bits)
            values = {name: _sum(server[name], tensor) for name, tensor in sent.items()}
            plain[number] = replace(message, tensors=values)
        return self.inner.server_step(job, server, plain)

    def finish_client(self, job: Job, client: Client, state: ClientState, server: Tensors) -> Update:
        return self.inner.finish_client(job, client, _without_residual(state), self._received(job, server))

    def model(self, job: Job, client: Client, state: ClientState, server: Tensors) -> nn.Module:
        return self.inner.model(job, client, _without_residual(state), self._received(job, server))

    def shared_model(self, job: Job, server: Tensors) -> nn.Module | None:
        return self.inner.shared_model(job, self._received(job, server))

    def shipped(self, job: Job, client: Client) -> tuple[str, Bits]:
        return self.inner.shipped(job, client)

    def factory(self, job: Job, client: Client) -> Callable[[], nn.Module]:
        return self.inner.factory(job, client)

    def _received(self, job: Job, payload: Tensors) -> Tensors:
        """What a client makes of a download; it knows the global model's names and shapes."""
        return payload if self.down_bits is None else decode(payload, self.inner.start_server(job), self.down_bits)


def _without_residual(state: ClientState) -> ClientState:
    tensors = {name: tensor for name, tensor in state.tensors.items() if not name.startswith(_RESIDUAL)}
    return replace(state, tensors=tensors)


def _difference(value: Tensor, received: Tensor) -> Tensor:
    return value - received if value.is_floating_point() else value  # counters travel as they are


def _sum(before: Tensor, difference: Tensor) -> Tensor:
    return before + difference if difference.is_floating_point() else difference
