"""Who competes in `bench linear`: our packed weights and torch's float ones, each in so many copies that every call is cold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import qupedkern as qk
from qupedkern.ops import OPS

from .native import available, native_call

COLD_BYTES = 160 << 20  # five times the last cache of the machines at hand: what comes round again is in none
MOST_COPIES = 256  # 4096 x 4096 at one bit takes 80
CHECKED_ROWS = 64
OP = "lut_linear"
DEVIATION = 0.02  # of the weights: that of layers this wide
FLOAT32_ERROR = 1e-5  # of the largest result: a sum of 11,008 float32 products in any order, far from a bfloat16's 4e-3
HALF_ERROR = 2e-2

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """calls(x): one call for each copy of the weight, x [batch, K] -> [batch, N].

    rows: [CHECKED_ROWS, K] float64, what the first copy holds in the rows `checked_rows`: results are checked against the
    weight a contender has itself, for rivals round it to other values.  allowed: the error of results, as a share of the
    largest.  turns: which copy is next, shared by those that share copies.  remark: what tables say of it.
    """

    calls: Callable[[Tensor], Sequence[Call]]
    rows: Tensor
    allowed: float
    turns: Iterator[int]
    remark: str = ""

    def in_turns(self, calls: Sequence[Call]) -> Call:
        """A call that each time takes the copy that was read longest ago."""
        return lambda: calls[next(self.turns)]()


def copies(nbytes: int) -> int:
    """How many copies of so large a weight are cold when they come round; of weights too small to matter fewer."""
    return max(1, min(MOST_COPIES, -(-COLD_BYTES // nbytes)))


def cold(weight: Tensor) -> list[Tensor]:
    """The weight and as many clones as it takes."""
    return [weight, *(weight.clone() for _ in range(copies(weight.nbytes) - 1))]


def checked_rows(n: int) -> Tensor:
    """Rows of the weight whose outputs are checked: the first, the last and some between; int64, ascending."""
    return torch.linspace(0, n - 1, min(n, CHECKED_ROWS), dtype=torch.float64).round().long()


def error(result: Tensor, x: Tensor, rows: Tensor, n: int) -> float:
    """Of a result's checked rows from the product in float64, as a share of that product's largest entry."""
    true = x.double() @ rows.T
    return float((result.detach()[:, checked_rows(n)].double() - true).abs().max() / true.abs().max())


def float_linear(weight: Tensor, dtype: torch.dtype) -> Contender:
    """torch's F.linear in that type; an input of another type is cast beforehand."""
    own = cold(weight.to(dtype))

    def calls(x: Tensor) -> list[Call]:
        x = x.to(dtype)
        return [partial(F.linear, x, w) for w in own]

    rows = own[0][checked_rows(len(weight))].double()
    return Contender(calls, rows, FLOAT32_ERROR if dtype == torch.float32 else HALF_ERROR, cycle(range(len(own))))


@dataclass(frozen=True)
class Packed:
    """Weights of one shape at `bits` bits, in copies of random codes: any bytes are codes of 2^bits centers.

    packed: uint8 [copies, bytes of one].  turns: see Contender.
    """

    bits: int
    shape: tuple[int, int]
    packed: Tensor
    turns: Iterator[int] = field(compare=False)

    @classmethod
    def drawn(cls, bits: int, shape: tuple[int, int]) -> Packed:
        each = -(-shape[0] * shape[1] * bits // 8)
        count = copies(each)
        codes = np.random.default_rng(bits).bytes(count * each)
        packed = torch.empty(count, each, dtype=torch.uint8)
        packed.numpy().reshape(-1)[:] = np.frombuffer(codes, dtype=np.uint8)
        return cls(bits, shape, packed, cycle(range(count)))

    def centers(self, per_channel: bool) -> Tensor:
        """Quantiles of normal weights, [m], or [N, m] of rows whose deviations differ by up to half."""
        shares = (torch.arange(2**self.bits, dtype=torch.float64) + 0.5) / 2**self.bits
        levels = DEVIATION * torch.special.ndtri(shares).float()
        return levels * torch.linspace(0.75, 1.25, self.shape[0])[:, None] if per_channel else levels

    def _contender(self, centers: Tensor, calls: Callable[[Tensor], Sequence[Call]]) -> Contender:
        n, k = self.shape
        kept = checked_rows(n)
        of_rows = self.packed[0].view(n, k * self.bits // 8)[kept].reshape(-1)  # rows of whole bytes
        codes = qk.unpack_codes(of_rows, self.bits, (len(kept), k))
        rows = qk.dequantize(codes, centers.double() if centers.dim() == 1 else centers[kept].double())
        return Contender(calls, rows, FLOAT32_ERROR if centers.dtype == torch.float32 else HALF_ERROR, self.turns)

    def native(self, dtype: torch.dtype, per_channel: bool = False) -> Contender | None:
        """The kernel call on an output allocated beforehand; None where there is no kernel."""
        if not available(OP):
            return None
        centers = self.centers(per_channel).to(dtype)

        def calls(x: Tensor) -> list[Call]:
            rest = (centers.float(), None, self.bits, list(self.shape))  # as the op hands them to the kernel
            out = OPS[OP].allocate(x, self.packed[0], *rest)
            kernels = [native_call(OP, (x, packed, *rest), (out,)) for packed in self.packed]

            def call(kernel: Callable[[], None]) -> Tensor:
                kernel()
                return out

            return [partial(call, kernel) for kernel in kernels]

        return self._contender(centers, calls)

    def layer(self, dtype: torch.dtype) -> Contender:
        """qk.nn.PackedLinear, called as a module."""
        centers, (n, k) = self.centers(False).to(dtype), self.shape
        arguments = {"in_features": k, "out_features": n}
        layers = [qk.nn.PackedLinear(arguments, packed, centers).eval() for packed in self.packed]
        return self._contender(centers, lambda x: [partial(layer, x) for layer in layers])
