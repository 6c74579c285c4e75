"""call and attempt: an op in plain eager mode, past torch's dispatcher, which costs more than a small op itself.

`torch.ops.qupedkern.<name>` stays the op of everything that watches: compilers, transforms, modes, subclasses, the profiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from qupedkern.backends import direct

from ._define import GRADIENTS, OPS, Gradient, laid_out, layout_of, output_hook, run, tensors_of
from ._scratch import borrow

_PLAIN = frozenset((Tensor, nn.Parameter))
_is_compiling = torch.compiler.is_compiling
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform, _trace = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_is_profiling, _is_recording = torch.autograd._profiler_enabled, torch.is_grad_enabled
_requires_grad = attrgetter("requires_grad")


def _watched() -> bool:
    """Whether anything but the caller must see this call: a mode, a transform, a trace or the profiler."""
    watches = _dispatch_modes() or _function_modes() or _is_profiling()
    return bool(watches) or _transform() is not None or _trace() is not None


def _look_at(args: Sequence[Any]) -> tuple[bool, bool]:
    """Whether every tensor is torch's own, no subclass, and whether autograd must record the call."""
    recording, learns = _is_recording(), False
    for value in args:
        kind = type(value)
        if kind in _PLAIN:
            learns = learns or (recording and value.requires_grad)
        elif kind is list:
            kinds = set(map(type, value))
            if not (kinds <= _PLAIN or kinds == {int}):
                return False, False
            learns = learns or (recording and kinds != {int} and any(map(_requires_grad, value)))
        elif isinstance(value, Tensor):
            return False, False
    return True, learns


def _keeps_nothing(reader: Sequence[Any]) -> bool:
    """Whether a call on these, and a tensor without gradient, leaves no trace in autograd's graph or another (an fx.Proxy)."""
    return set(map(type, reader)) <= _PLAIN and not (_is_recording() and any(map(_requires_grad, reader)))


class _Recorded(torch.autograd.Function):
    """An op with its gradient: what register_autograd makes of it, without a tree of lists to flatten and build again."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Gradient, compute: Callable[..., Any], layout: list[Any], *tensors: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        outputs = compute(*laid_out(layout, iter(tensors)))
        extra = outputs[-gradient.statistics :] if gradient.statistics else ()
        ctx.mark_non_differentiable(*extra)
        ctx.save_for_backward(*tensors, *extra)
        ctx.gradient, ctx.layout = gradient, layout
        return outputs if isinstance(outputs, Tensor) else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient, saved = ctx.gradient, iter(ctx.saved_tensors)
        inputs = laid_out(ctx.layout, saved)
        found: list[Tensor | None] = []
        grad = list(grads) if gradient.returns_list else grads[0]

        def op(*args: Any) -> Any:
            return attempt(f"{gradient.name}_backward", args)

        for value, given in zip(gradient.of(op, grad, inputs, saved), inputs, strict=True):
            if isinstance(value, list):
                found += value
            elif isinstance(given, Tensor):
                found.append(value)
        return None, None, None, *found


def _recorded(gradient: Gradient, compute: Callable[..., Any], args: Sequence[Any]) -> Any:
    outputs = _Recorded.apply(gradient, compute, layout_of(args), *tensors_of(args))
    return list(outputs) if gradient.returns_list else outputs


def call(name: str, *args: Any) -> Any:
    """torch.ops.qupedkern.<name>(*args), for arguments as `prepare` gives them."""
    if not _is_compiling() and not _watched():
        plain, learns = _look_at(args)
        if plain and not learns:
            return run(OPS[name], args)
        if plain and name in GRADIENTS:
            return _recorded(GRADIENTS[name], lambda *given: run(OPS[name], given), args)
    return getattr(torch.ops.qupedkern, name)(*args)


def attempt(
    name: str, args: Sequence[Any], otherwise: Callable[..., Any] | None = None, *, reader: Sequence[Any] | None = None
) -> Any:
    """An op on arguments nobody has checked: by the kernel that CPU tensors get, which checks them itself before it writes.

    Where something watches, or the kernel does not take the arguments as they are, otherwise(*args): the public function, which
    mends them or says what is wrong; without it call, for arguments as `prepare` gives them.
    reader: what the next call gets beside the one output, which nothing else sees; where autograd keeps nothing of that call,
    the output is memory this thread has borrowed until it borrows again. Its shape is then the op's last argument, its type
    that of the second.
    """
    if not _is_compiling() and not _watched():
        kernel = direct(name)
        first = args[0][0] if isinstance(args[0], list) and args[0] else args[0]
        if kernel is not None and isinstance(first, Tensor) and first.is_cpu:
            try:
                return _directly(name, kernel, args, reader)
            except _REFUSALS:
                pass  # nothing is written yet; what follows takes these arguments or says what is wrong with them
    return call(name, *args) if otherwise is None else otherwise(*args)


class _Refused(Exception):
    """Not for a direct call."""


_REFUSALS = (_Refused, TypeError, ValueError, NotImplementedError)


def _directly(name: str, kernel: Callable[..., None], args: Sequence[Any], reader: Sequence[Any] | None) -> Any:
    plain, learns = _look_at(args)
    if not plain:
        raise _Refused
    if not learns:
        lent = None
        if reader is not None and _keeps_nothing(reader):
            lent = borrow(args[1].dtype, args[-1])
        return _compute(name, kernel, lent, *args)
    gradient = GRADIENTS.get(name)
    if gradient is None:
        raise _Refused
    others = [value for position, value in enumerate(args) if position not in gradient.positions]
    if any(map(_requires_grad, tensors_of(others))):
        raise _Refused
    return _recorded(gradient, partial(_compute, name, kernel, None), args)


def _compute(name: str, kernel: Callable[..., None], lent: Tensor | None, *args: Any) -> Any:
    outputs = OPS[name].allocate(*args) if lent is None else lent
    written = outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
    if output_hook.fill is not None:
        for output in tensors_of(written):
            output_hook.fill(output)
    kernel(*args, *written)
    return outputs
