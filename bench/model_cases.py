"""The models of `bench model`: networks whose weights fit a cache, and some in which reading the weights is the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qupedkern.nn import PackedLayer, PackedLinear


class MLP(nn.Module):
    """Linear layers of one width with ReLU between. x: [batch, width] -> the same."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DecoderBlock(nn.Module):
    """A transformer block as it generates: one new token attends to `context` cached ones; pre-norm, four times wider inside.

    x: [batch, width] -> the same. The cached keys and values are fixed.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(1, heads, context, width // heads), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, 1, -1)) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        cached = (t.expand(len(x), -1, -1, -1) for t in (self.keys, self.values))
        keys, values = (torch.cat([old, new], dim=2) for old, new in zip(cached, (k, v), strict=True))
        x = x + self.out(F.scaled_dot_product_attention(q, keys, values).flatten(1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@dataclass(frozen=True)
class Case:
    """kind: "network" (weights in cache), "weights" (they dominate) or "embedding". build: the float model.

    inputs: what it is called with, in turns.  batch: as tables name it.
    """

    kind: str
    batch: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], list[Tensor]]


def _resnet(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from fl import models

        return models.build(name, (3, 32, 32), 10, seed=0)

    return build


def _normal(*shape: int) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(shape, generator=torch.Generator().manual_seed(0))]


def _tokens(count: int, vocabulary: int) -> Callable[[], list[Tensor]]:
    """So many batches of random tokens that the rows they touch are those of the whole table, several times over."""

    def draw() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(vocabulary, (count,), generator=generator) for _ in range(4 * vocabulary // count)]

    return draw


CASES: dict[str, list[Case]] = {
    **{
        title: [Case("network", f"batch {batch}", _resnet(name), _normal(batch, 3, 32, 32)) for batch in (128, 1)]
        for title, name in (("ResNet-20", "resnet20"), ("ResNet-32", "resnet32"))
    },
    "MLP 4 x 4096": [Case("weights", "batch 1", lambda: MLP(4096, 4), _normal(1, 4096))],
    "decoder block 2048": [Case("weights", "batch 1", lambda: DecoderBlock(2048, 16, 256), _normal(1, 2048))],
    "embedding 32000 x 512": [
        Case("embedding", "1,000 tokens", lambda: nn.Sequential(nn.Embedding(32000, 512)), _tokens(1000, 32000))
    ],
    "MLP 3 x 128": [Case("weights", "batch 1", lambda: MLP(128, 3), _normal(1, 128))],
    "ResNet-8": [Case("network", "batch 1", _resnet("resnet8"), _normal(1, 3, 32, 32))],
    "embedding 500 x 64": [
        Case("embedding", "50 tokens", lambda: nn.Sequential(nn.Embedding(500, 64)), _tokens(50, 500))
    ],
}


def weights_bytes(model: nn.Module) -> int:
    """Of all weights with two or more dimensions, packed ones with their centers."""
    packed = [m for m in model.modules() if isinstance(m, PackedLayer)]
    stored: list[Tensor] = [t for m in packed for t in (m.packed, m.centers)]
    plain = [p for m in model.modules() if m not in packed for p in m.parameters(recurse=False) if p.dim() > 1]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in (*stored, *plain)}.values())


def products(model: nn.Module, x: Tensor) -> list[tuple[nn.Linear | PackedLinear, Tensor]]:
    """The model's linear layers and what each is given when the model is called with x."""
    found: list[tuple[nn.Linear | PackedLinear, Tensor]] = []
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, PackedLinear))]
    handles = [m.register_forward_pre_hook(lambda m, args: found.append((m, args[0].clone()))) for m in linear]
    model(x)
    for handle in handles:
        handle.remove()
    return found
