"""The measurement of whole models packs all of a model, checks it, and says what is kept of the kernels' promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import model, model_cases
from bench.model_cases import MLP, Case, DecoderBlock, products, weights_bytes
from bench.records import Case as Measured
from bench.records import Row


def row(**medians_us: float) -> Row:
    times = {name.replace("_", " ").replace("F linear", "F.linear"): [us, us, us] for name, us in medians_us.items()}
    machine = {
        "machine": "m",
        "cores": 2,
        "caches": "",
        "torch": "2",
        "threads": 1,
        "native": "",
        "malloc": "",
        "commit": "",
    }
    return Row("model", "MLP 4 x 4096", "MLP 4 x 4096, batch 1, 1 thread", 4, "float32", "weights", 8, times, machine)


def test_what_is_kept_of_the_promise_is_the_speedup_over_that_of_the_model_with_the_kernels_in_it() -> None:
    # kernels 8 times faster, beside 120 us of other work: the model would be 1000 / 230 times, and is 4 times, faster
    one = row(float=1000.0, packed=250.0, F_linear_alone=880.0, kernels_alone=110.0)
    promised, kept = (column for column in model.TABLES[1].columns if isinstance(column, model._OfPromise))
    assert promised.value(Measured((one,))) == pytest.approx(1000 / 230)
    assert kept.value(Measured((one,))) == pytest.approx(4 * 230 / 1000)
    slower = replace(one, time_us_p20_p50_p80={**one.time_us_p20_p50_p80, "packed": [320.0] * 3})
    assert "| 8.00 | 4.35 | **71.9 %** (≥ 85 %) |" in model.TABLES[1].render([slower])
    assert kept.value(Measured((row(float=1000.0, packed=200.0, F_linear_alone=880.0),))) is None


def test_the_targets_of_networks_have_no_slack_and_all_are_of_cases_that_are_timed() -> None:
    titles = {
        f"{name}, {case.batch}, {threads}"
        for name in model.NAMES
        for case in model_cases.CASES[name]
        for threads in model._THREADS
    }
    targets = {key: t for table in model.TABLES for column in table.columns for key, t in column.targets.items()}
    assert {key[0] for key in targets} == titles
    networks = {key[0].split(", ")[1]: t for key, t in targets.items() if key[2] == "network"}
    assert not networks["batch 128"].met(1.031)
    assert networks["batch 128"].met(1.03)
    assert networks["batch 1"].met(1.08)
    assert not networks["batch 1"].met(1.081)


def test_a_decoder_block_attends_to_the_cached_tokens_and_its_own() -> None:
    torch.manual_seed(0)
    block = DecoderBlock(8, 2, 3).double()
    x = torch.randn(2, 8, dtype=torch.float64)
    q, k, v = block.qkv(block.norm1(x)).reshape(2, 3, 2, 4).unbind(1)  # [batch, heads, 4]
    keys, values = (
        torch.cat([old.expand(2, 2, 3, 4), new[:, :, None]], 2) for old, new in ((block.keys, k), (block.values, v))
    )
    shares = torch.softmax(torch.einsum("bhd,bhtd->bht", q, keys) / 2, -1)
    y = x + block.out(torch.einsum("bht,bhtd->bhd", shares, values).reshape(2, 8))
    torch.testing.assert_close(block(x), y + block.down(F.gelu(block.up(block.norm2(y)))))


def test_products_are_the_linear_layers_in_order_with_the_inputs_they_have() -> None:
    mlp, x = MLP(4, 3), torch.randn(1, 4)
    found = products(mlp, x)
    assert [layer for layer, _ in found] == list(mlp.layers)
    torch.testing.assert_close(found[1][1], F.relu(mlp.layers[0](x)))
    assert not any(layer._forward_pre_hooks for layer in mlp.layers)


def test_weights_at_b_bits_take_b_of_32_parts_and_their_centers() -> None:
    mlp = MLP(64, 2)
    assert weights_bytes(mlp) == 2 * 64 * 64 * 4
    assert weights_bytes(model.packed(mlp, 2)) == 2 * (64 * 64 * 2 // 8 + 4 * 4)


def test_a_packed_model_that_is_wrong_or_not_all_packed_gets_no_time() -> None:
    made = model.packed(MLP(16, 2), 4)
    x = torch.randn(1, 16)
    model.check("it", made, x)
    right = made[0].layers[1].forward
    made[0].layers[1].forward = lambda x: 1.001 * right(x)
    with pytest.raises(RuntimeError, match=r"^it: off by 0\.001 of the largest output, allowed are 1e-4"):
        model.check("it", made, x)
    with pytest.raises(RuntimeError, match=r"model: 0\.1 is not packed: Bilinear is not one of "):
        model.packed(nn.Sequential(nn.Linear(3, 3), nn.Bilinear(3, 3, 3)), 4)


@pytest.mark.parametrize(
    ("kind", "build", "inputs"),
    [
        ("weights", lambda: MLP(32, 2), model_cases._normal(1, 32)),
        ("network", lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), model_cases._normal(2, 3, 6, 6)),
        ("embedding", lambda: nn.Sequential(nn.Embedding(40, 8)), model_cases._tokens(10, 40)),
    ],
)
def test_a_row_has_both_models_and_where_weights_dominate_the_kernels(
    kind: str, build: Callable[[], nn.Module], inputs: Callable[[], list[torch.Tensor]]
) -> None:
    case = Case(kind, "few", build, inputs)
    one, four = model.measure("it", case, (1, 4), threads=1, rounds=2)
    assert one.time_us("float") == four.time_us("float")
    assert four.ratio("packed", "float") > 0
    assert one.quality["weights"] < four.quality["weights"] < 0.5
    assert one.has(model.LINEARS) == (kind == "weights")
    tables = [table.render([one, four]) for table in model.TABLES]
    assert sum("| it, few, 1 thread |" in table for table in tables) == 1
    with pytest.raises(KeyError, match="'ResNet' is none of ResNet-20"):
        model.rows(["ResNet"], [1], rounds=1, threads=1, compiled=False)
