"""A pool whose adapters are opened when they are used, beside one that has them all; and what attaching costs."""

from dataclasses import replace

import pytest
import torch
from live_models import IDS, in_thread, logits

from loraweave.composer.composer import Composer
from loraweave.composer.live import fitting
from loraweave.errors import AdapterUnsupported, AlreadyActive, BaseModelMismatch, LayerMismatch, UnknownExpert
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import fingerprint
from loraweave.hub.pool import ExpertPool
from loraweave.types import Factors, Fingerprint

ROWS = IDS[:2]
MIXTURES = [{"a": 0.7, "c": -0.4}, [{"b": 1.0}, {"a": 0.5, "b": 0.5}], [None, {"c": 2.0}]]


class Shelf:
    """A lazy pool of adapters that knows which were opened."""

    def __init__(self, adapters):
        self._adapters = {adapter.name: adapter for adapter in adapters}
        self.opened = []
        self.pool = ExpertPool.on_demand(self._adapters, self)

    def __call__(self, name):
        self.opened.append(name)
        return replace(self._adapters[name])


@pytest.fixture
def adapters(tiny_llama, make_adapters):
    return make_adapters(tiny_llama, "llama")


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_lazy_pool_gives_the_same_bits_as_one_that_is_not(mixture, tiny_llama, adapters):
    with Composer(tiny_llama, adapters).activate(mixture):
        expected = logits(tiny_llama, ROWS)
    with Composer(tiny_llama, Shelf(adapters).pool).activate(mixture):
        assert torch.equal(logits(tiny_llama, ROWS), expected)


def test_only_the_experts_of_a_mixture_are_opened_and_each_once(tiny_llama, adapters):
    shelf = Shelf(adapters)
    engine = Composer(tiny_llama, shelf.pool)
    assert (shelf.opened, engine.pool.names, dict(engine.target_layers)) == ([], ("a", "b", "c"), {})
    for _ in range(3):
        with engine.activate([{"a": 1.0, "b": 0.0}, None]):
            logits(tiny_llama, ROWS)
    assert shelf.opened == ["a"]
    assert set(engine.target_layers) == set(adapters[0].layers)


def test_a_lazy_pool_fuses_the_same_bits_and_opens_what_it_fuses(tiny_llama, adapters):
    with Composer(tiny_llama, adapters).fused({"a": 0.7, "c": -0.4}):
        expected = logits(tiny_llama, ROWS)
    shelf = Shelf(adapters)
    with Composer(tiny_llama, shelf.pool).fused({"a": 0.7, "c": -0.4}) as handle:
        assert torch.equal(logits(tiny_llama, ROWS), expected)
        handle.switch({"a": 0.7})
    assert sorted(set(shelf.opened)) == ["a", "c"]


def test_an_expert_of_a_lazy_pool_that_does_not_fit_is_named_when_it_is_activated(tiny_llama, adapters):
    wide = Factors(torch.ones(1, 999), torch.ones(16, 1))
    bad = [
        Adapter("wide", "tiny", {"model.layers.0.self_attn.q_proj": wide}),
        Adapter("lost", "tiny", {"model.layers.9.self_attn.q_proj": wide}),
        replace(adapters[0], name="headed", heads={"lm_head.weight": torch.ones(61, 16)}),
        replace(adapters[0], name="alien", fingerprint=Fingerprint("of another model")),
    ]
    engine = Composer(tiny_llama, Shelf([*adapters, *bad]).pool)
    before = logits(tiny_llama, ROWS)
    for name, error in (
        ("wide", LayerMismatch),
        ("lost", LayerMismatch),
        ("headed", AdapterUnsupported),
        ("alien", BaseModelMismatch),
    ):
        for use in (engine.activate, lambda mixture: engine.fused(mixture).__enter__()):
            with pytest.raises(error, match=f"expert '{name}'"):
                use({"a": 0.5, name: 0.5})
    with pytest.raises(UnknownExpert):
        engine.activate({"x": 1.0})
    assert not engine.active
    assert torch.equal(logits(tiny_llama, ROWS), before)
    with engine.activate({"a": 1.0}):
        assert not torch.equal(logits(tiny_llama, ROWS), before)


def test_an_expert_that_fits_the_fingerprint_is_taken(tiny_llama, adapters):
    known = [replace(adapter, fingerprint=fingerprint(tiny_llama)) for adapter in adapters]
    with Composer(tiny_llama, Shelf(known).pool).activate({"a": 1.0, "b": 1.0}):
        logits(tiny_llama, ROWS)


def test_layers_of_an_expert_opened_later_reach_an_activation_of_another_thread(tiny_llama, adapters):
    with Composer(tiny_llama, adapters).activate({"b": 1.0}):
        expected = logits(tiny_llama, ROWS)
    engine = Composer(tiny_llama, Shelf(adapters).pool)

    def other():
        with engine.activate({"b": 1.0}):
            return logits(tiny_llama, ROWS)

    with engine.activate({"a": 1.0}):
        before = logits(tiny_llama, ROWS)
        found = in_thread(other)
        assert torch.equal(logits(tiny_llama, ROWS), before)
    assert torch.equal(found, expected)
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_an_unbound_expert_is_bound_when_it_is_opened_and_refused_while_the_base_is_fused(tiny_llama, adapters):
    layer = "model.layers.0.self_attn.q_proj"
    factors = replace(adapters[0].layers[layer], magnitude_O=torch.full((16,), 2.0))
    dora = Adapter("dora", "tiny", {layer: factors})
    with Composer(tiny_llama, [*adapters, dora]).activate({"dora": 1.0}):
        expected = logits(tiny_llama, ROWS)
    engine = Composer(tiny_llama, Shelf([*adapters, dora]).pool)
    with engine.fused({"a": 1.0}) as handle:
        handle.switch({"b": 1.0})
        with pytest.raises(AlreadyActive, match=r"layer .* holds the weights of a fused mixture"):
            handle.switch({"dora": 1.0})
    with engine.activate({"dora": 1.0}):
        assert torch.equal(logits(tiny_llama, ROWS), expected)


@pytest.fixture
def looked_at(monkeypatch):
    """The layers that are compared with the model's."""
    found = []
    real = fitting.target_layer

    def counted(modules, name, *rest):
        found.append(name)
        return real(modules, name, *rest)

    monkeypatch.setattr(fitting, "target_layer", counted)
    return found


def test_adapters_of_one_form_are_compared_with_the_model_once(tiny_llama, make_adapter, looked_at):
    many = [make_adapter(tiny_llama, f"e{seed}", rank=1 + seed % 3, seed=seed) for seed in range(50)]
    engine = Composer(tiny_llama, many)
    assert sorted(looked_at) == sorted(many[0].layers)
    looked_at.clear()
    other = make_adapter(tiny_llama, "other", targets=("down_proj",))
    engine.swap([*many, other])
    assert sorted(looked_at) == sorted([*many[0].layers, *other.layers])
