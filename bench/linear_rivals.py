"""The 4-bit kernels a user could install instead: bitsandbytes, torch's int4, torchao. All of them compute in bfloat16."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_contenders import HALF_ERROR, Call, Contender, checked_rows, cold

GROUP = 128  # weights that share a scale: the default of torchao
BLOCK = 64  # the same of NF4


class Unavailable(Exception):
    """Why a rival cannot run here. One sentence."""


def _imported(name: str) -> Any:
    """A package and what it says on import kept to itself. Unavailable where it is not there or does not load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(name)
    except Exception as error:  # a package built for another torch fails in its own ways
        missing = isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]
        why = "not installed; the extra 'bench' has it" if missing else f"does not load: {error}"
        raise Unavailable(f"{name.partition('.')[0]} is {why}" if missing else f"{name} {why}") from error
    finally:
        logging.disable(before)


def nf4(weight: Tensor) -> Contender:
    """bitsandbytes' NF4 as its Linear4bit runs it in inference on the CPU."""
    package, functional = _imported("bitsandbytes"), _imported("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        raise Unavailable("bitsandbytes has a 4-bit kernel only for processors with AVX512_BF16")
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    rows = functional.dequantize_4bit(codes, state)[checked_rows(len(weight))].double()
    packed, state = functional._convert_weight_packed_for_cpu(codes, state)  # what Linear4bit does in its first call
    own = cold(packed)
    remark = f"bitsandbytes {package.__version__}, the kernel of its wheel, one scale for {BLOCK} weights"
    return Contender(
        lambda x: [partial(package.matmul_4bit, x, w, quant_state=state) for w in own],
        rows,
        HALF_ERROR,
        cycle(range(len(own))),
        remark,
    )


def _in_bfloat16(multiply: Callable[[Tensor, Any], Tensor], x: Tensor, weight: Any) -> Tensor:
    """The cast is part of the call: without it torch's kernel takes a scalar path for float32, 30 times slower."""
    return multiply(x.bfloat16(), weight).to(x.dtype)


def _int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """torch's packed codes, its scales and zeros [K / GROUP, N, 2] in bfloat16, and the checked rows they stand for."""
    n, k = weight.shape
    if k % GROUP:
        raise Unavailable(f"int4 rivals need rows of whole groups of {GROUP} weights, got {k}")
    grouped = weight.reshape(n, k // GROUP, GROUP)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / 15).bfloat16()
    codes = ((grouped - low) / scale.float()).round().clamp(0, 15).to(torch.int32)
    zero = (low + 8 * scale.float()).bfloat16()  # the value of code 8
    kept = checked_rows(n)
    rows = (codes[kept].double() - 8) * scale[kept].double() + zero[kept].double()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.reshape(n, k), 1)
    scales_and_zeros = torch.stack([part.squeeze(-1).t() for part in (scale, zero)], dim=-1).contiguous()
    return packed, scales_and_zeros, rows.reshape(len(kept), k)


def int4(weight: Tensor) -> dict[str, Callable[[], Contender]]:
    """torch's int4 kernel for the CPU, and torchao's tensor through F.linear, which is that kernel behind a subclass."""

    @lru_cache(maxsize=1)
    def quantized() -> tuple[Tensor, Tensor, Tensor]:
        return _int4(weight)

    def contender(multiply: Callable[[Tensor, Any], Tensor], own: list[Any], rows: Tensor, remark: str) -> Contender:
        def calls(x: Tensor) -> list[Call]:
            return [partial(_in_bfloat16, multiply, x, w) for w in own]

        return Contender(calls, rows, HALF_ERROR, cycle(range(len(own))), remark)

    def torch_int4() -> Contender:
        packed, scales_and_zeros, rows = quantized()

        def multiply(x: Tensor, w: Tensor) -> Tensor:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, scales_and_zeros)

        kernel = "aten::_weight_int4pack_mm_for_cpu"
        remark = f"{kernel}, one scale and zero for {GROUP} weights, float32 cast to bfloat16 and back"
        return contender(multiply, cold(packed), rows, remark)

    def torchao_int4() -> Contender:
        package = _imported("torchao")
        tensor = _imported("torchao.prototype.quantization.int4").Int4OpaqueTensor
        packed, scales_and_zeros, rows = quantized()
        own = [tensor(w, scales_and_zeros, [1, GROUP], weight.shape) for w in cold(packed)]
        remark = f"torchao {package.__version__}, Int4OpaqueTensor, the same kernel behind a tensor subclass"
        return contender(F.linear, own, rows, remark)

    return {"torch int4": torch_int4, "torchao int4": torchao_int4}


def torchao_intx(weight: Tensor, bits: int) -> Contender:
    """torchao's weight-only layer of 1 to 8 bits: a byte a weight in memory, all of it dequantized in each call."""
    package, quantization = _imported("torchao"), _imported("torchao.quantization")
    granularity = _imported("torchao.quantization.granularity").PerGroup(GROUP)
    if weight.shape[1] % GROUP:
        raise Unavailable(f"torchao needs rows of whole groups of {GROUP} weights, got {weight.shape[1]}")
    layer = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
    layer[0].weight = torch.nn.Parameter(weight, requires_grad=False)
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=granularity,
        mapping_type=_imported(
            "torchao.quantization.quant_primitives"
        ).MappingType.ASYMMETRIC,  # the other is NaN at int1
    )
    quantization.quantize_(layer, config)
    rows = layer[0].weight.dequantize()[checked_rows(len(weight))].double()
    remark = f"torchao {package.__version__}, IntxWeightOnlyConfig of as many bits, one scale for {GROUP} weights"
    # one copy: the dequantized weight alone is larger than the caches
    return Contender(lambda x: [partial(layer, x.to(weight.dtype))], rows, HALF_ERROR, cycle(range(1)), remark)
