"""What runs on this machine, and why; with `inspect FILE`, what a packed model's file holds."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys

import torch

from qupedkern import backends
from qupedkern._version import __version__
from qupedkern.files.header import LayerRecord
from qupedkern.files.read import open_packed


def machine() -> str:
    """Library, Python, torch and threads in one line, then the table of backends and ops."""
    line = f"qupedkern {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    return f"{line}, {torch.get_num_threads()} threads, {platform.machine()}\n\n{backends()}"


def brief() -> str:
    """The backends in one line."""
    table = backends()
    parts = [f"{name}: {table.unavailable.get(name, text)}" for name, text in table.descriptions.items()]
    return f"qupedkern {__version__}, " + "; ".join(parts)


def inspect(path: str) -> str:
    """Per layer of a packed file: kind, shape, levels, groups, bytes; then the totals."""
    with open_packed(path) as file:
        file.check()
        header, stored = file.header, {name: tensor.nbytes for name, tensor in file.container.stored.items()}
    lines = [f"{path}: packed model, format {header.version}, written by qupedkern {header.library_version}"]
    packed, weights = 0, 0
    for name, record in header.layers.items():
        size = stored.get(f"{name}.packed", 0) + stored.get(f"{name}.centers", 0)
        packed += size
        weights += math.prod(record.shape) if f"{name}.packed" in stored else 0
        lines.append(_layer_line(name, record, size))
    total = sum(stored.values())
    lines.append(f"  other tensors {total - packed:,} bytes")
    lines.append(
        f"  weights {packed:,} bytes, {8 * packed / max(weights, 1):.2f} bits each; float32 {4 * weights:,} bytes"
    )
    lines.append(
        f"  file {os.path.getsize(path):,} bytes, tensors {total:,}, as float32 {4 * weights + total - packed:,}"
    )
    return "\n".join(lines)


def _layer_line(name: str, record: LayerRecord, size: int) -> str:
    """size: bytes of its codes and centers; 0 where they are another layer's."""
    shape = "x".join(map(str, record.shape))
    return f"  {name:<24} {record.kind:<8} {shape:>16} {record.levels:>4} levels {record.groups:>5} groups {size:>10,} bytes"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qupedkern", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("inspect", help="what a packed model's file holds").add_argument("file")
    parser.add_argument("--brief", action="store_true", help="the backends in one line")
    options = parser.parse_args()
    try:
        if options.command == "inspect":
            print(inspect(options.file))
        else:
            print(brief() if options.brief else machine())
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
