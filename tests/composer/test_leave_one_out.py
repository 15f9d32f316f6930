"""What each expert of a mixture is worth: losses with and without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.model import scoring
from loraweave.errors import AlreadyActive, CompositionError, ScopeError
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task

Make = Callable[..., Any]
TASK = Task([("ab", "c"), ("de f", "ag"), ("b", "ccc")], instruction="Go on.")


@pytest.fixture
def engine(tiny_llama: nn.Module, make_adapter: Make, tokenizer: Any) -> Composer:
    adapters = [make_adapter(tiny_llama, name, targets=("q_proj", "down_proj"), seed=at) for at, name in enumerate("abc")]
    return Composer(tiny_llama, adapters, tokenizer=tokenizer)


def mean_loss(engine: Composer, mixture: Any) -> float:
    with engine.activate(mixture):
        losses = scoring.losses(engine.model, engine.tokenizer, TASK, TASK.examples)
    return sum(losses) / len(losses)


class Changed:
    """Arrow's weights as `change` makes them."""

    def __init__(self, router: Any, change: Callable[[Tensor], Tensor]) -> None:
        self.router = router
        self.change = change

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        return self.change(self.router.weights(x_BTI, layer))


class Whole:
    """A router that gives the weights of a call when the call begins."""

    def begin(self, model: nn.Module, arguments: Mapping[str, Any]) -> MixtureWeights:
        assert arguments["input_ids"].ndim == 2
        return MixtureWeights.of({"a": 0.5, "b": -0.25, "c": 0.75}, ["a", "b", "c"])

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        raise AssertionError("the router of a call is another")


def test_a_router_of_the_bound_pool_is_taken_as_activate_takes_it(
    tiny_llama: nn.Module, make_adapter: Make, tokenizer: Any
) -> None:
    layers = {name: module for name, module in tiny_llama.named_modules() if name.endswith("q_proj")}
    adapters = [make_adapter(tiny_llama, name, targets=("q_proj",), seed=at) for at, name in enumerate("ab")]
    with_magnitudes = [
        replace(
            adapter,
            layers={
                name: replace(part, magnitude_O=1.1 * layers[name].weight.detach().norm(dim=1))
                for name, part in adapter.layers.items()
            },
        )
        for adapter in adapters
    ]
    engine = Composer(tiny_llama, with_magnitudes, tokenizer=tokenizer)
    router = lw.router("arrow", engine.bound_pool)
    found = engine.leave_one_out(TASK, router, progress=False)
    keeping_b = Changed(router, lambda w_BTE: w_BTE * torch.tensor([0.0, 1.0]))
    assert found["a"] == pytest.approx(mean_loss(engine, keeping_b) - mean_loss(engine, router), abs=1e-5)


def test_known_weights_are_left_out_one_by_one(engine: Composer) -> None:
    found = engine.leave_one_out(TASK, {"a": 0.5, "c": -0.8}, progress=False)
    whole = mean_loss(engine, {"a": 0.5, "c": -0.8})
    assert list(found) == ["a", "c"]
    assert found["a"] == pytest.approx(mean_loss(engine, {"c": -0.8}) - whole, abs=1e-6)
    assert found["c"] == pytest.approx(mean_loss(engine, {"a": 0.5}) - whole, abs=1e-6)
    assert abs(found["a"]) > 1e-5


def test_a_routers_other_weights_stay_or_keep_the_sum(engine: Composer) -> None:
    router = lw.router("arrow", engine.pool)
    keep_E = torch.tensor([1.0, 0.0, 1.0])
    whole = mean_loss(engine, router)
    rest = mean_loss(engine, Changed(router, lambda w_BTE: w_BTE * keep_E))
    scaled = mean_loss(engine, Changed(router, lambda w_BTE: torch.nn.functional.normalize(w_BTE * keep_E, p=1, dim=-1)))
    found = engine.leave_one_out(TASK, router, progress=False)
    assert list(found) == ["a", "b", "c"]
    assert found["b"] == pytest.approx(rest - whole, abs=1e-6)
    renormalised = engine.leave_one_out(TASK, router, renormalise=True, progress=False)
    assert renormalised["b"] == pytest.approx(scaled - whole, abs=1e-6)
    assert abs(rest - scaled) > 1e-5


def test_a_router_of_whole_inputs_is_asked_once_a_call(engine: Composer) -> None:
    found = engine.leave_one_out(TASK, Whole(), progress=False)
    known = engine.leave_one_out(TASK, {"a": 0.5, "b": -0.25, "c": 0.75}, progress=False)
    assert found == pytest.approx(known, abs=1e-6)


def test_the_only_expert_renormalised_leaves_the_base(engine: Composer) -> None:
    found = engine.leave_one_out(TASK, {"b": 0.7}, renormalise=True, progress=False)
    assert found["b"] == pytest.approx(mean_loss(engine, {}) - mean_loss(engine, {"b": 0.7}), abs=1e-6)


def test_the_examples_are_tokenised_once_for_all_experts(engine: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    plain = type(engine.tokenizer).__call__

    def counting(self: Any, text: Any, **settings: Any) -> Any:
        texts.extend(text)
        return plain(self, text, **settings)

    monkeypatch.setattr(type(engine.tokenizer), "__call__", counting)
    engine.leave_one_out(TASK, lw.router("arrow", engine.pool), progress=False)
    # a prompt and a target of each example
    assert len(texts) == len(set(texts)) == 2 * len(TASK.examples)


def test_what_cannot_be_left_out_is_named(engine: Composer, tiny_llama: nn.Module) -> None:
    with pytest.raises(ScopeError, match="one mixture for all examples, but this one has 3 rows"):
        engine.leave_one_out(TASK, [{"a": 1.0}, None, None])
    with pytest.raises(ScopeError, match="has 2 rows"):
        engine.leave_one_out(TASK, [lw.router("arrow", engine.pool), None])
    with engine.fused({"a": 1.0}), pytest.raises(AlreadyActive, match="cannot leave experts out while"):
        engine.leave_one_out(TASK, {"a": 1.0})
    with pytest.raises(CompositionError, match="needs a tokenizer"):
        Composer(tiny_llama, engine.pool).leave_one_out(TASK, {"a": 1.0})
