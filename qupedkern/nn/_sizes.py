"""LayerSize: what one layer takes once packed; summary tells it of a model, inspect of a file."""

from __future__ import annotations

import math
from dataclasses import dataclass

SIZE_COLUMNS = ("layer", "kind", "shape", "levels", "groups", "bits/weight", "codes", "centers", "bias")


@dataclass(frozen=True)
class LayerSize:
    """One layer of a quantized or packed model. Bytes are those of its tensors once packed, 0 for what another layer holds."""

    name: str
    kind: str
    shape: tuple[int, ...]
    levels: int
    bits: int
    groups: int
    codes_bytes: int
    centers_bytes: int
    bias_bytes: int

    @property
    def weights(self) -> int:
        """Weights held here: 0 where they are another layer's."""
        return math.prod(self.shape) if self.codes_bytes else 0

    @property
    def weight_bytes(self) -> int:
        """Codes and centers."""
        return self.codes_bytes + self.centers_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.bias_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of codes and centers; 0 where the weights are another layer's."""
        return 8 * self.weight_bytes / self.weights if self.weights else 0.0

    def cells(self) -> tuple[str, ...]:
        """A line of a table under SIZE_COLUMNS."""
        shape, bits = "x".join(map(str, self.shape)), f"{self.bits_per_weight:.2f}" if self.weights else "shared"
        sizes = (f"{size:,}" for size in (self.codes_bytes, self.centers_bytes, self.bias_bytes))
        return self.name, self.kind, shape, f"{self.levels}", f"{self.groups}", bits, *sizes
