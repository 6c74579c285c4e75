"""Post-training quantization of the QuPeD authors' own ResNets for CIFAR-10: no training, one call, read back from the file.

    python examples/post_training_resnet.py --data DIR

DIR (or the environment's QUPEDKERN_DATA) holds
    quped-resnets/*.pt          state dicts of ResNet-20 and ResNet-32, MIT licence, from the repository kazkara/QuPeD
    cifar10/test_batch.bin.xz, cifar10/data_batch_1.bin.xz     CIFAR-10 (Krizhevsky 2009) in its binary layout
or --weights and --cifar name them. Every row is the accuracy, on the 10,000 test images, of a file as qk.load reads it back.

k-means minimises the squared error of the weights; "Fisher" weighs each by its squared gradient over 1,000 training images;
"+ norms" then gathers the batch norms' statistics anew over the same images. The first convolution and the last layer stay in
float, as quantize_weights_ leaves them by default.
"""

from __future__ import annotations

import argparse
import copy
import json
import lzma
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qupedkern as qk

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # what the networks were trained with
RECORD = 1 + 3 * 32 * 32  # a label byte, then red, green and blue planes
CALIBRATION = 1000  # training images for "Fisher" and "+ norms"
VARIANTS = ("k-means", "Fisher", "Fisher + norms")
Batches = list[tuple[Tensor, Tensor]]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut without weights: every other pixel, and zeros for the new channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2)))


class ResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016 (arXiv:1512.03385), section 4.2, option A; 6 blocks + 2 layers deep."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                *(BasicBlock(before if i == 0 else width, width, stride if i == 0 else 1) for i in range(blocks))
            )
            for before, width, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3)))


def read_weights(path: Path) -> tuple[int, dict[str, Tensor]]:
    """Blocks a stage and the state dict of a checkpoint; tensors only, nothing pickled is run."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    blocks = sum(name.startswith("layer1.") and name.endswith(".conv1.weight") for name in state)
    return blocks, state


def read_images(path: Path, count: int, batch: int) -> Batches:
    """The first `count` images of a file of records, normalised, and their labels."""
    with lzma.open(path) as file:
        records = np.frombuffer(file.read(count * RECORD), np.uint8).reshape(-1, RECORD)
    x = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / 255)
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
    y = torch.from_numpy(records[:, 0].astype(np.int64))
    return list(zip(x.split(batch), y.split(batch), strict=True))


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Percent."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / sum(len(y) for _, y in batches)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def packed(
    model: nn.Module, variant: str, bits: int, groups: str, importance: dict[str, Tensor], calibration: Batches
) -> nn.Module:
    """A copy of the model in packed form."""
    model = copy.deepcopy(model)
    qk.quantize_weights_(model, bits=bits, groups=groups, importance=importance if "Fisher" in variant else None)
    if "norms" in variant:
        qk.recalibrate_(model, calibration)
    return model.eval()


def through_file(model: nn.Module, factory: Callable[[], nn.Module]) -> tuple[nn.Module, int]:
    """The model as its file gives it back, and the file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        qk.save(model, path)
        return qk.load(factory, path).eval(), path.stat().st_size


def rows(path: Path, test: Batches, calibration: Batches, widths: list[int]) -> Iterator[dict[str, object]]:
    """The float network's accuracy and size, then those of each width, groups and variant."""
    blocks, state = read_weights(path)

    def factory() -> nn.Module:
        return ResNet(blocks)

    model = factory().eval()
    model.load_state_dict(state)
    name = f"ResNet-{6 * blocks + 2}"
    size = sum(value.nbytes for value in model.state_dict().values())
    yield {"network": name, "bits": 32, "groups": "", "bytes": size, "float": accuracy(model, test)}
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in calibration for i in range(len(y))]
    importance = qk.squared_gradients(model, singles, loss)
    for bits in widths:
        for groups in ("tensor", "channel"):
            row: dict[str, object] = {"network": name, "bits": bits, "groups": groups}
            for variant in VARIANTS:
                shipped, row["bytes"] = through_file(
                    packed(model, variant, bits, groups, importance, calibration), factory
                )
                row[variant] = accuracy(shipped, test)
            yield row


def table(found: list[dict[str, object]]) -> str:
    lines = ["| network | bits | centers | KiB | " + " | ".join(VARIANTS) + " |", "| --- " * (4 + len(VARIANTS)) + "|"]
    for row in found:
        size = f"{int(row['bytes']) / 1024:,.0f}"  # type: ignore[call-overload]
        if "float" in row:
            cells = ["float", "", size, f"{row['float']:.2f}", *[""] * (len(VARIANTS) - 1)]
        else:
            cells = [str(row["bits"]), f"per {row['groups']}", size, *(f"{row[name]:.2f}" for name in VARIANTS)]
        lines.append(f"| {row['network']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("QUPEDKERN_DATA"), help="(or QUPEDKERN_DATA)")
    parser.add_argument("--weights", type=Path, nargs="+", help="checkpoints (default: quped-resnets/*.pt in --data)")
    parser.add_argument("--cifar", type=Path, help="directory of the .bin.xz files (default: cifar10 in --data)")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--images", type=int, default=10_000, help="of the test set")
    parser.add_argument("--calibration", type=int, default=CALIBRATION, help="training images")
    parser.add_argument("--threads", type=int, help="torch's (default: as torch sets them)")
    parser.add_argument("--out", type=Path, help="records, JSON lines")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    data = Path(options.data) if options.data else None
    if data is None and not (options.weights and options.cifar):
        parser.error("say where the data is: --data DIR, or QUPEDKERN_DATA, or --weights and --cifar")
    weights = options.weights or sorted((data / "quped-resnets").glob("*.pt"))
    cifar = options.cifar or data / "cifar10"
    needed = [*weights, cifar / "test_batch.bin.xz", cifar / "data_batch_1.bin.xz"]
    missing = [str(path) for path in needed if not path.is_file()] or ([] if weights else ["any checkpoint (*.pt)"])
    if missing:
        print(f"post_training_resnet: there is no {', no '.join(missing)}", file=sys.stderr)
        return 2
    test = read_images(cifar / "test_batch.bin.xz", options.images, 500)
    calibration = read_images(cifar / "data_batch_1.bin.xz", options.calibration, 100)
    found: list[dict[str, object]] = []
    for path in weights:
        started = time.perf_counter()
        for row in rows(path, test, calibration, options.bits):
            found.append(row)
            print(f"{row} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)
    print(f"Accuracy on {sum(len(y) for _, y in test):,} test images of CIFAR-10, %; size of the model's file\n")
    print(table(found))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
