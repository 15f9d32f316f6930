"""A Composer whose experts page within a budget answers as one that holds them all; loading and unloading while it runs."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from live_models import IDS, in_threads, logits

from loraweave.composer.composer import Composer
from loraweave.composer.live import fitting
from loraweave.composer.live.resolve import resolve
from loraweave.errors import (
    AdapterNotFound,
    AlreadyActive,
    BudgetExceeded,
    CompositionError,
    LayerMismatch,
    UnknownExpert,
    WeightingError,
)
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

ROWS = IDS[:2]
NAMES = [f"e{number}" for number in range(10)]


@pytest.fixture
def adapters(tiny_llama, make_adapter):
    return {
        name: make_adapter(tiny_llama, name, rank=1 + seed % 3, seed=seed, targets=("q_proj", "v_proj", "down_proj"))
        for seed, name in enumerate(NAMES)
    }


def size_of(adapter):
    return sum(factors.a_RI.nbytes + factors.b_OR.nbytes for factors in adapter.layers.values())


@pytest.fixture
def budget(adapters):
    """Room for any three."""
    return 3 * max(map(size_of, adapters.values()))


def mixtures():
    for turn in range(30):
        yield [{NAMES[turn * 3 % 10]: 1.0}, {NAMES[turn * 7 % 10]: 0.5, NAMES[(turn * 3 + 1) % 10]: -0.5}]


def test_experts_that_page_within_a_budget_give_the_same_bits(tiny_llama, adapters, budget):
    whole, paged = Composer(tiny_llama, adapters), Composer(tiny_llama, adapters, host_budget_bytes=budget)
    for mixture in mixtures():
        with whole.activate(mixture):
            expected = logits(tiny_llama, ROWS)
        with paged.activate(mixture):
            assert torch.equal(logits(tiny_llama, ROWS), expected)
        assert paged.residency.host_bytes <= budget
    assert paged.residency.num_evictions > 10
    assert whole.residency.num_evictions == 0
    assert whole.residency.num_misses == 10


def test_more_experts_than_the_budget_holds_are_refused_before_the_model_runs_and_it_still_answers(
    tiny_llama, adapters, budget
):
    engine = Composer(tiny_llama, adapters, host_budget_bytes=budget)
    base = logits(tiny_llama, ROWS)
    needed = sum(map(size_of, adapters.values()))
    with pytest.raises(BudgetExceeded, match=rf"the 10 experts .* need {needed:,} bytes, but host.* is {budget:,}"):
        engine.activate(dict.fromkeys(NAMES, 0.1))
    assert not engine.active
    assert torch.equal(logits(tiny_llama, ROWS), base)
    with engine.activate({"e2": 1.0}):
        inside = logits(tiny_llama, ROWS)
        with pytest.raises(BudgetExceeded, match=r"beside the .* that open activations use"):
            engine.activate({"e1": 1.0, "e4": 1.0, "e5": 1.0})
        assert torch.equal(logits(tiny_llama, ROWS), inside)


def test_what_an_activation_leaves_behind_does_not_keep_an_expert_that_has_gone(tiny_llama, adapters, budget):
    alive = weakref.WeakSet()

    def opener(name):
        opened = replace(
            adapters[name], layers={k: replace(v, a_RI=v.a_RI.clone()) for k, v in adapters[name].layers.items()}
        )
        alive.add(opened)
        return opened

    tensors = weakref.WeakSet()
    engine = Composer(tiny_llama, ExpertPool.on_demand(adapters, opener), host_budget_bytes=budget)
    for _ in range(3):
        for name in NAMES:
            with engine.activate({name: 1.0}):
                logits(tiny_llama, ROWS)
                tensors.update(engine._residents._host._slots[key].thing for key in engine._residents._host._slots)
    gc.collect()
    assert len(tensors) == engine.residency.num_on_host <= 4


def test_the_figures_of_an_engine_count_hits_and_misses(tiny_llama, adapters):
    engine = Composer(tiny_llama, adapters)
    for _ in range(3):
        with engine.activate({"e0": 1.0, "e1": 0.5}):
            logits(tiny_llama, ROWS)
    figures = engine.residency
    assert (figures.num_hits, figures.num_misses, figures.num_on_host) == (4, 2, 2)
    assert figures.host_bytes == size_of(adapters["e0"]) + size_of(adapters["e1"])


@pytest.mark.parametrize("wanted", [["e1", "e2"], {"e1": 1.0, "e2": 0.5}, [{"e1": 1.0}, {"e2": 1.0}]])
def test_what_was_prefetched_is_a_hit_for_the_activation(wanted, tiny_llama, adapters):
    engine = Composer(tiny_llama, ExpertPool.on_demand(adapters, adapters.__getitem__))
    engine.prefetch(wanted).result(timeout=60)
    before = engine.residency
    with engine.activate({"e1": 1.0, "e2": 0.5}):
        logits(tiny_llama, ROWS)
    assert (before.num_misses, engine.residency.num_misses, engine.residency.num_hits) == (2, 2, 2)
    engine.close()


def test_an_error_while_prefetching_is_raised_by_the_activation_that_wants_the_expert(tiny_llama, adapters):
    def opener(name):
        if name == "e3":
            raise AdapterNotFound("no adapter 'e3' any more")
        return adapters[name]

    engine = Composer(tiny_llama, ExpertPool.on_demand(adapters, opener))
    assert isinstance(engine.prefetch(["e3"]).exception(timeout=60), AdapterNotFound)
    with engine.activate({"e1": 1.0}):
        logits(tiny_llama, ROWS)
    with pytest.raises(AdapterNotFound, match="no adapter 'e3' any more"):
        engine.activate({"e3": 1.0})
    with pytest.raises(UnknownExpert):
        engine.prefetch(["x"])
    engine.close()
    with pytest.raises(CompositionError, match="closed"):
        engine.prefetch(["e1"])


def test_prefetching_beside_activations_in_threads_leaves_each_its_own_mixture(tiny_llama, adapters):
    expected = {}
    for name in NAMES:
        with Composer(tiny_llama, adapters).activate({name: 1.0}):
            expected[name] = logits(tiny_llama, ROWS)
    budget = 6 * max(map(size_of, adapters.values()))
    engine = Composer(tiny_llama, ExpertPool.on_demand(adapters, adapters.__getitem__), host_budget_bytes=budget)

    def work(number):
        for turn in range(12):
            name = NAMES[(number * 3 + turn) % 10]
            with engine.activate({name: 1.0}):
                engine.prefetch([NAMES[(number * 3 + turn + 1) % 10]])
                assert torch.equal(logits(tiny_llama, ROWS), expected[name])

    assert in_threads([partial(work, number) for number in range(4)]) == [None] * 4
    engine.close()
    assert engine.residency.host_bytes == 0


@pytest.mark.own_models
def test_a_model_that_moved_has_its_experts_moved_too(tiny_llama, adapters):
    engine = Composer(tiny_llama, adapters)
    with engine.activate({"e0": 1.0}):
        logits(tiny_llama, ROWS)
    tiny_llama.to(torch.bfloat16)
    with engine.activate({"e0": 1.0, "e1": 1.0}):
        found = logits(tiny_llama, ROWS)
    assert engine.residency.host_bytes == (size_of(adapters["e0"]) + size_of(adapters["e1"])) // 2
    with Composer(tiny_llama, adapters).activate({"e0": 1.0, "e1": 1.0}):
        assert torch.equal(logits(tiny_llama, ROWS), found)


@pytest.mark.parametrize("lazy", [False, True])
def test_an_expert_is_loaded_and_unloaded_while_another_is_in_use(lazy, tiny_llama, adapters, make_adapter):
    more = make_adapter(tiny_llama, "more", targets=("down_proj", "lm_head"), seed=77)
    with Composer(tiny_llama, [more]).activate({"more": 1.0}):
        expected = logits(tiny_llama, ROWS)
    engine = Composer(tiny_llama, ExpertPool.on_demand(adapters, adapters.__getitem__) if lazy else ExpertPool(adapters))
    with engine.activate({"e0": 1.0}):
        before = logits(tiny_llama, ROWS)
        engine.load("more", more)
        assert engine.pool.names == (*NAMES, "more")
        assert torch.equal(logits(tiny_llama, ROWS), before)
        with engine.activate({"more": 1.0}):
            assert torch.equal(logits(tiny_llama, ROWS), expected)
            with pytest.raises(AlreadyActive, match="expert 'more' is in use by an open activation"):
                engine.unload("more")
        engine.unload("more")
        with pytest.raises(AlreadyActive, match="expert 'e0' is in use"):
            engine.unload("e0")
        assert torch.equal(logits(tiny_llama, ROWS), before)
    engine.unload("e0")
    assert engine.pool.names == tuple(NAMES[1:])
    assert engine.bound_pool.names == engine.pool.names
    with pytest.raises(UnknownExpert):
        engine.activate({"more": 1.0})


def test_a_name_that_was_unloaded_may_be_loaded_with_another_adapter(tiny_llama, adapters):
    engine = Composer(tiny_llama, adapters)
    with engine.activate({"e1": 1.0}):
        expected = logits(tiny_llama, ROWS)
    with engine.activate({"e0": 1.0}):
        logits(tiny_llama, ROWS)
    engine.unload("e0")
    engine.load("e0", adapters["e1"])
    with engine.activate({"e0": 1.0}):
        assert torch.equal(logits(tiny_llama, ROWS), expected)


def test_what_cannot_be_loaded_or_unloaded_is_named_and_changes_nothing(tiny_llama, adapters):
    engine = Composer(tiny_llama, adapters)
    pool = engine.pool
    with pytest.raises(WeightingError, match="the pool has an expert 'e1' already: unload"):
        engine.load("e1", adapters["e2"])
    wide = Adapter("wide", "tiny", {"model.layers.0.self_attn.q_proj": Factors(torch.ones(1, 999), torch.ones(16, 1))})
    with pytest.raises(LayerMismatch, match="expert 'wide'"):
        engine.load("wide", wide)
    with pytest.raises(UnknownExpert, match="no expert 'e11' in the pool, did you mean"):
        engine.unload("e11")
    with engine.fused({"e1": 1.0}):
        for change in (lambda: engine.load("x", adapters["e1"]), lambda: engine.unload("e2")):
            with pytest.raises(AlreadyActive, match="while a mixture is fused"):
                change()
    assert engine.pool is pool
    single = Composer(tiny_llama, {"e0": adapters["e0"]})
    with pytest.raises(WeightingError, match="the pool is empty"):
        single.unload("e0")
    single.close()
    for change in (lambda: single.load("x", adapters["e1"]), lambda: single.unload("e0")):
        with pytest.raises(CompositionError, match="closed"):
            change()


def test_one_more_adapter_costs_one_comparison_with_the_model_whatever_the_pool(tiny_llama, make_adapter, monkeypatch):
    many = {f"e{seed}": make_adapter(tiny_llama, f"e{seed}", seed=seed) for seed in range(300)}
    engine = Composer(tiny_llama, many)
    compared = []
    real = fitting.Fitting.adapter

    def counted(self, name, adapter):
        compared.append(name)
        return real(self, name, adapter)

    monkeypatch.setattr(fitting.Fitting, "adapter", counted)
    for number in range(3):
        engine.load(f"more{number}", make_adapter(tiny_llama, "more", seed=number))
    assert compared == ["more0", "more1", "more2"]


def test_a_swap_keeps_what_is_resident_of_adapters_that_stay(tiny_llama, adapters):
    engine = Composer(tiny_llama, adapters)
    with engine.activate({"e0": 1.0, "e1": 1.0}):
        logits(tiny_llama, ROWS)
    engine.swap({**adapters, "e1": adapters["e5"], "more": adapters["e2"]})
    with Composer(tiny_llama, adapters).activate({"e0": 1.0, "e5": 1.0}):
        expected = logits(tiny_llama, ROWS)
    with engine.activate({"e0": 1.0, "e1": 1.0}):
        assert torch.equal(logits(tiny_llama, ROWS), expected)
    assert (engine.residency.num_hits, engine.residency.num_misses) == (1, 3)


def test_a_hundred_cycles_of_loading_using_and_unloading_leave_no_adapter_behind(tiny_llama, adapters, make_adapter):
    engine = Composer(tiny_llama, adapters)
    alive = weakref.WeakSet()
    for number in range(100):
        # of ranks that no other has, with biases that are resolved against the base
        more = make_adapter(tiny_llama, "more", seed=number, rank=1 + number % 7)
        parts = {layer: replace(part, magnitude_O=torch.ones(part.b_OR.shape[0])) for layer, part in more.layers.items()}
        more = replace(more, layers=parts)
        alive.add(more)
        engine.load("more", more)
        with engine.activate({"more": 1.0, "e0": 0.5}):
            logits(tiny_llama, ROWS)
        engine.unload("more")
    del more
    gc.collect()
    assert len(alive) == 0
    assert engine.residency.num_on_host == 1
    assert len(engine._residents._layouts) == 1
    assert engine._fitting._weights.of == {}


def test_an_activation_looks_only_at_the_experts_that_it_names(tiny_llama, adapters):
    def refuse(name):
        if name.startswith("other"):
            raise AssertionError(f"{name} was opened")
        return adapters[name]

    pool = ExpertPool.on_demand([*(f"other{number}" for number in range(10_000)), *NAMES], refuse)
    engine = Composer(tiny_llama, pool)
    for mixture in ({"e3": 1.0, "e1": 0.5}, [{"e3": 1.0}, {"e1": 2.0}]):
        weights = resolve(mixture, pool)
        assert isinstance(weights, MixtureWeights)
        # in the order of the pool
        assert weights.experts == ("e1", "e3")
        with engine.activate(mixture):
            logits(tiny_llama, ROWS)
    with engine.activate(MixtureWeights(torch.ones(1, 1, 1, 1), ("e1",), ("model.layers.0.self_attn.q_proj",))):
        logits(tiny_llama, ROWS)
    with pytest.raises(WeightingError, match="layer 'nowhere'"):
        engine.activate(MixtureWeights(torch.ones(1, 1, 1, 1), ("e1",), ("nowhere",)))
    for nothing in ({}, [None, None]):
        with engine.activate(nothing):
            logits(tiny_llama, ROWS)
