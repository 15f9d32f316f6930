"""The cost of a mixture, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from command_line import cells
from expert_families import WARNINGS, logits, make, save_families
from rich.console import Console
from tiny_models import Make
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.extensions.explain.costs import LayerCost, cost
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

pytestmark = WARNINGS

IN, OUT = 5, 4


def expert(name: str, rank: int, **more: Any) -> Adapter:
    return Adapter(name, "tiny", {"0": Factors(torch.ones(rank, IN), torch.ones(OUT, rank), **more)})


@pytest.fixture
def engine() -> Composer:
    model = nn.Sequential(nn.Linear(IN, OUT))
    return Composer(model, [expert("a", 1), expert("b", 3), expert("c", 2, gain_O=torch.ones(OUT), bias_O=torch.ones(OUT))])


def product(tokens: int, rank: int) -> int:
    """FLOPs of x a^T, of its weighting, and of the product with b."""
    return tokens * (2 * rank * IN + rank + 2 * rank * OUT)


def test_a_shared_mixture_costs_its_ranks_for_every_token(engine: Composer) -> None:
    with engine.activate({"a": 0.5, "b": 1.0}):
        engine.model(torch.ones(2, 6, IN))
    assert cost(engine)["0"] == LayerCost(
        base_flops=2 * 12 * IN * OUT,
        base_bytes=4 * (IN * OUT + OUT),
        added_flops=product(12, 1) + product(12, 3) + 12 * OUT,
        added_bytes=4 * 4 * (IN + OUT),
        kernel=engine.last_weights.layers["0"].kernel,
    )


def test_rows_and_tokens_without_an_expert_do_not_pay_for_it(engine: Composer) -> None:
    with engine.activate([{"a": 1.0}, {"b": 1.0}, None]):
        engine.model(torch.ones(3, 6, IN))
    assert cost(engine)["0"].added_flops == product(6, 1) + product(6, 3) + 12 * OUT
    w_BTE = torch.zeros(1, 3, 3)
    w_BTE[0, 0, 0] = w_BTE[0, 1, 0] = w_BTE[0, 1, 1] = 1.0
    with engine.activate(MixtureWeights(w_BTE[:, :, None], ("a", "b", "c"))):
        engine.model(torch.ones(1, 3, IN))
    assert cost(engine)["0"].added_flops == product(2, 1) + product(1, 3) + 2 * OUT
    assert cost(engine)["0"].added_bytes == 4 * 4 * (IN + OUT)


def test_gain_and_bias_are_counted(engine: Composer) -> None:
    with engine.activate({"c": 1.0}):
        engine.model(torch.ones(1, 6, IN))
    counted = cost(engine)["0"]
    assert counted.added_flops == product(6, 2) + 6 * (3 + 2) * OUT + 6 * OUT
    assert counted.added_bytes == 4 * (2 * (IN + OUT) + 2 * OUT)


def test_factors_are_counted_in_the_layers_own_dtype(engine: Composer) -> None:
    engine.model.to(torch.bfloat16)
    with engine.activate({"a": 1.0}):
        engine.model(torch.ones(1, 1, IN, dtype=torch.bfloat16))
    assert (cost(engine)["0"].base_bytes, cost(engine)["0"].added_bytes) == (2 * (IN * OUT + OUT), 2 * (IN + OUT))


def test_an_embedding_looks_up_what_its_tokens_need() -> None:
    factors = Factors(torch.ones(2, 9), torch.ones(OUT, 2), kind="embedding")
    engine = Composer(nn.Sequential(nn.Embedding(9, OUT)), [Adapter("e", "tiny", {"0": factors})])
    with engine.activate({"e": 1.0}):
        engine.model(torch.tensor([[1, 2, 3]]))
    assert cost(engine)["0"] == LayerCost(0, 4 * 3 * OUT, 3 * (2 + 2 * 2 * OUT) + 3 * OUT, 4 * (2 * 3 + 2 * OUT))


def test_the_kernel_of_each_layer_is_a_file_of_its_folder(engine: Composer) -> None:
    mixtures: list[Any] = [
        {"a": 1.0, "b": 2.0},
        [{"a": 1.0}, {"b": 1.0}],
        [None, {"b": 1.0}],
        MixtureWeights(torch.rand(1, 6, 1, 3), ("a", "b", "c")),
    ]
    found = set()
    for mixture in mixtures:
        with engine.activate(mixture):
            engine.model(torch.ones(2, 6, IN))
        found.add(cost(engine)["0"].kernel)
    assert found <= {"dense", "gathered", "merged", "native_rows", "segments", "shared", "sorted_tokens"}
    assert len(found) > 1


def test_the_base_alone_costs_nothing_more(engine: Composer) -> None:
    with engine.activate({}):
        engine.model(torch.ones(2, 6, IN))
    counted = cost(engine).total
    assert (counted.added_flops, counted.added_bytes) == (0, 0)
    assert counted.base_flops == 2 * 12 * IN * OUT


def test_the_total_is_the_sum_and_the_table_shows_it(tiny_llama: nn.Module, make_adapters: Make) -> None:
    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"))
    with engine.activate({"a": 1.0, "c": 1.0}):
        tiny_llama(input_ids=torch.arange(3, 9)[None])
    counted = cost(engine)
    ranks = {
        layer: sum(engine.pool[name].layers[layer].rank for name in "ac" if layer in engine.pool[name].layers)
        for layer in counted
    }
    sizes = {layer: tiny_llama.get_submodule(layer).weight.shape for layer in counted}
    assert counted.total.added_bytes == sum(4 * ranks[layer] * sum(sizes[layer]) for layer in counted)
    assert counted.total.added_flops == sum(
        6 * (2 * ranks[layer] * sum(sizes[layer]) + ranks[layer] + sizes[layer][0]) for layer in counted
    )
    console = Console(width=120)
    with console.capture() as capture:
        console.print(counted.table())
    last = cells(capture.get().splitlines()[-1])
    assert last[:3] == ["all", str(len(counted)), f"{counted.total.added_flops:,}"]
    assert last[5] == f"{counted.total.added_bytes / counted.total.base_bytes:.2%}"
    assert counted.to_json()["total"]["added_bytes"] == counted.total.added_bytes


def test_the_table_names_a_parameter_that_holds_many_experts(tmp_path_factory: pytest.TempPathFactory) -> None:
    _, adapters = save_families(tmp_path_factory)("mixtral")
    model = make("mixtral")
    engine = Composer(model, {"a": adapters["a"]})
    with engine.activate({"a": 1.0}):
        logits(model)
    assert "gate_up_proj" in str(cost(engine).table().columns[0]._cells)


def test_of_a_lazy_pool_each_expert_is_opened_once() -> None:
    opened = []

    def opener(name: str) -> Adapter:
        opened.append(name)
        return expert(name, 1 + len(name) % 3)

    names = [f"expert {number}" for number in range(40)]
    engine = Composer(nn.Sequential(nn.Linear(IN, OUT)), ExpertPool.on_demand(names, opener))
    with engine.activate(MixtureWeights(torch.ones(1, 1, 1, 40), tuple(names))):
        engine.model(torch.ones(1, 6, IN))
        used = engine.last_weights
        opened.clear()
        counted = cost(engine, used)
        assert len(opened) <= 40
    ranks = sum(1 + len(name) % 3 for name in names)
    assert counted["0"].added_bytes == 4 * ranks * (IN + OUT)
