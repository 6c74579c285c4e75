"""Run one op on one backend and hold it against its float64 reference; outputs are poisoned before the kernel writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qupedkern.backends import EAGER, has_kernel, module, names, use_backend, why_not
from qupedkern.ops import OPS
from qupedkern.ops._define import mutated, output_hook, tensors_of
from qupedkern.ops._rows import compute_dtype
from qupedkern.ops.hard_quantize import nearest

from .bounds import smallest_of
from .soft_tolerances import arithmetic_of
from .tolerances import BOUNDS, ROUNDOFF, SMALLEST, assert_close, undecided, with_output_rounding

# Decisions and moves of bits: the same bits from every backend.
BITWISE = (
    "assign",
    "dequantize",
    "dequantize_packed",
    "hard_quantize",
    "pack_codes",
    "packed_embedding",
    "prox_weights",
    "unpack_codes",
)
# Products of matrices are torch's where they run eager, and its order of addition follows the number of threads.
TORCH_PRODUCTS = (("lut_linear", EAGER), ("lut_linear_backward", EAGER))
# Names of the arguments that gradients are for.
LEARNABLE = ("x", "centers", "bias", "student_logits", "teacher_logits")


def running_backends() -> tuple[str, ...]:
    """Backends that run on this machine, eager first."""
    return (EAGER, *(name for name in names() if name != EAGER and module(name).unavailable() is None))


def missing_backends() -> dict[str, str]:
    """Backends that do not run here, with the reason."""
    reasons = ((name, module(name).unavailable()) for name in names() if name != EAGER)
    return {name: reason for name, reason in reasons if reason is not None}


def kernels() -> list[tuple[str, str]]:
    """(op, backend) for every kernel that runs here; eager has one for each op."""
    return [(op, backend) for op in OPS for backend in running_backends() if has_kernel(backend, op)]


def poison(output: Tensor) -> None:
    """NaN, or 0xA5 in every byte of an integer: what a kernel forgets to write is seen."""
    output.fill_(float("nan") if output.dtype.is_floating_point else 0xA5)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    before, output_hook.fill = output_hook.fill, poison
    try:
        yield
    finally:
        output_hook.fill = before


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result in a row, those of lists too."""
    return tuple(tensors_of([result]))


def each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """change(tensor) for a tensor and for those of a list; anything else as it is."""
    if isinstance(value, Tensor):
        return change(value)
    return [each(change, v) for v in value] if isinstance(value, list) else value


def device_of(backend: str) -> str:
    """The device its kernels are tested on: the CPU where they run there, interpreted ones too."""
    return "cpu" if backend == EAGER or "cpu" in module(backend).DEVICES else module(backend).DEVICES[0]


def on_device_of(backend: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments on the backend's device, strides and offsets and the gaps between elements as they are."""
    device = device_of(backend)
    if device == "cpu":
        return args

    def moved(tensor: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return tuple(each(moved, a) for a in args)


def unshared(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments, those the op writes in place as copies with the same strides."""
    written = mutated(op)
    return tuple(each(Tensor.clone, a) if i in written else a for i, a in enumerate(args))


def _everything(op: str, args: tuple[Any, ...], result: Any) -> tuple[Tensor, ...]:
    """The outputs, then what was written in place."""
    return (*as_tuple(result), *(t for i in mutated(op) for t in tensors_of([args[i]])))


def run(op: str, args: tuple[Any, ...], backend: str) -> tuple[Tensor, ...] | None:
    """The outputs of torch.ops.qupedkern.<op> on op arguments; None where this backend refuses them, with its sentence.

    The arguments are moved to the backend's device, the outputs back. For an op that works in place, also what it wrote,
    last; the arguments themselves stay as they were.
    """
    args = unshared(op, on_device_of(backend, args))
    with use_backend(backend), poisoned_outputs():
        if not has_kernel(backend, op) or backend == EAGER or why_not(backend, op, args) is None:
            return tuple(t.cpu() for t in _everything(op, args, getattr(torch.ops.qupedkern, op)(*args)))
        try:
            getattr(torch.ops.qupedkern, op)(*args)
        except RuntimeError as error:
            sentence = str(error)
        else:
            raise AssertionError(f"{op}: backend {backend!r} refuses these arguments but ran when it was forced")
    if not sentence.startswith(f"{op}: backend {backend!r} was requested but cannot run: "):
        raise AssertionError(f"{op}: backend {backend!r} should have refused these arguments, but raised: {sentence}")
    return None


def compute_type(args: tuple[Any, ...]) -> torch.dtype:
    """The type an op computes in: the widest compute type of its float arguments."""
    types = [compute_dtype(a) for a in tensors_of(args) if a.dtype.is_floating_point]
    return torch.float64 if torch.float64 in types else torch.float32


def upcast(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Float tensors in float64, all tensors contiguous, everything else as it is."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.contiguous().double() if tensor.dtype.is_floating_point else tensor.contiguous()

    return tuple(each(wide, a) for a in args)


def settled(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with no element beside a midpoint, for ops whose result jumps there: it moves below all centers."""
    arguments = [a.name for a in getattr(torch.ops.qupedkern, op).default._schema.arguments]
    if op not in ("hard_quantize_backward", "distance_backward", "prox_centers"):
        return args
    x = args[arguments.index("x")]
    c = args[arguments.index("centers")]
    if op == "prox_centers" and args[arguments.index("at")] is not None:
        c = args[arguments.index("at")]
    dtype = compute_type(args)
    near = undecided(x.double(), c.double(), u=ROUNDOFF[dtype], eta=SMALLEST[dtype])
    if not bool(near.any()):
        return args
    rows = c.reshape(-1, c.shape[-1]).double()
    far = rows[:, :1] - rows[:, :1].abs() - (rows[:, -1:] - rows[:, :1]) - torch.finfo(x.dtype).tiny
    below = far.expand(-1, x.numel() // rows.shape[0]).reshape(x.shape).to(x.dtype)
    moved = torch.where(near, below, x)
    return tuple(moved if name == "x" else a for name, a in zip(arguments, args, strict=True))


def objective(op: str, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """What is compared of an output: itself, or what it minimises where two minimisers may be as good as each other."""
    if op != "init_centers" or args[3] != "kmeans":
        return output
    x, _, groups, _, weights = args
    rows, c = x.double().reshape(groups, -1), output.double().reshape(groups, -1)
    w = 1.0 if weights is None else weights.double().reshape(groups, -1)
    return (w * (rows - nearest(rows, c)).square()).sum(1)


def check(op: str, args: tuple[Any, ...], backend: str) -> None:
    """Shape, type and value of every output against the float64 reference within its bound, and eager's bits where they are due."""
    args = settled(op, args)
    got = run(op, args, backend)
    if got is None:
        return
    dtype = compute_type(args)
    u, eta = ROUNDOFF[dtype], smallest_of(op, args, dtype)
    wide = upcast(args)
    with arithmetic_of(backend):
        bounds = BOUNDS[op](*wide, u=u, eta=eta)
    wide = unshared(op, wide)
    expected = _everything(op, wide, OPS[op].reference(*wide))
    shaped = _everything(op, args, OPS[op].allocate(*args))
    for i, (value, wanted, bound, like) in enumerate(zip(got, expected, bounds, shaped, strict=True)):
        what = f"{op} on {backend}, output {i}"
        assert value.shape == like.shape, f"{what}: shape {tuple(value.shape)}, allocated {tuple(like.shape)}"
        assert value.dtype == like.dtype, f"{what}: {value.dtype}, allocated {like.dtype}"
        if i < len(as_tuple(OPS[op].allocate(*args))):
            assert value.is_contiguous(), f"{what}: strides {value.stride()} for shape {tuple(value.shape)}"
        value, wanted = objective(op, args, value), objective(op, args, wanted).double()
        assert_close(value, wanted, with_output_rounding(bound, wanted, value.dtype, u), what)
    if op in BITWISE and backend != EAGER:
        eager = run(op, args, EAGER)
        assert eager is not None
        for value, other in zip(got, eager, strict=True):
            assert same_bits(value, other), f"{op}: {backend} and eager differ in their bits"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit, signs of zero included; any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    bits = [v.detach().contiguous().view(integers) for v in (a, b)]
    return bool(((bits[0] == bits[1]) | (a.isnan() & b.isnan())).all())


def gradient_arguments(op: str) -> tuple[int, ...]:
    """Positions of the arguments that <op>_backward returns gradients for, in order."""
    backward = OPS.get(f"{op}_backward")
    if backward is None:
        return ()
    arguments = getattr(torch.ops.qupedkern, op).default._schema.arguments
    found = len(getattr(torch.ops.qupedkern, f"{op}_backward").default._schema.returns)
    learnable = [i for i, a in enumerate(arguments) if a.name in LEARNABLE]
    if len(learnable) != found:
        raise AssertionError(f"{op}_backward returns {found} gradients, but {op} takes {len(learnable)} of {LEARNABLE}")
    return tuple(learnable)
