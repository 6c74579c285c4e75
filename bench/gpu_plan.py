"""How much bench/gpu.sh measures, and until which second each part may go on."""

from __future__ import annotations

from dataclasses import dataclass

LUT_SHAPES = ((8192, 28672), (8192, 8192), (4096, 11008), (4096, 4096))  # out, in: the largest first
LUT_BATCHES = (1, 4, 16, 64, 256, 4096)
LUT_BITS = (4, 3, 2, 1)
ROTATED_BYTES = 240 * 2**20  # of weights a row goes round, so that they come from memory and not from L2
FLUSH_BYTES = 256 * 2**20  # several times the largest L2


@dataclass(frozen=True)
class Plan:
    """ends: part -> seconds after the start; "build", "tests" and "sanitizer" run beside each other before the rest."""

    numel: int
    matmul: int
    rounds: int
    shapes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    bits: tuple[int, ...]
    examples: int  # hypothesis's, an op and property
    models: tuple[tuple[str, int], ...]  # architecture and batch
    clients: tuple[int, ...]
    ends: dict[str, float]
    stall: float  # seconds without a word after which a case is given up
    rotated: int = ROTATED_BYTES
    flush: int = FLUSH_BYTES


PLANS = {
    "quick": Plan(
        1 << 26, 8192, 11, LUT_SHAPES[:1], (1, 16, 256, 4096), LUT_BITS, 6, (("resnet20", 128),), (50,),
        {"build": 70, "tests": 105, "sanitizer": 105, "ceilings": 120, "ops": 160, "lut_linear": 190, "models": 206,
         "clients": 218, "compiled": 232}, 30.0,
    ),
    "full": Plan(
        1 << 26, 8192, 21, LUT_SHAPES, LUT_BATCHES, LUT_BITS, 20, (("resnet20", 128), ("resnet18", 256)), (50, 500),
        {"build": 100, "tests": 170, "sanitizer": 170, "ceilings": 190, "ops": 280, "lut_linear": 380, "models": 430,
         "clients": 470, "compiled": 520}, 60.0,
    ),
    # A processor in place of a GPU, for the tests: every line of the measuring code, nothing large.
    "smoke": Plan(
        4096, 32, 3, ((32, 128),), (1, 4), (2, 3), 1, (("small", 4),), (3,),
        dict.fromkeys(("build", "tests", "sanitizer", "ceilings", "ops", "lut_linear", "models", "clients", "compiled"), 900.0),
        300.0, 8192, 1 << 16,
    ),
}  # fmt: skip
