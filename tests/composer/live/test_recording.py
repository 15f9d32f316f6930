"""engine.last_weights and engine.record(): what the layers used, in this thread and no other."""

import asyncio
import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from live_models import in_threads, in_whole_graphs
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.composer.live import recording
from loraweave.errors import CompositionError, ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

IDS = torch.arange(3, 24).reshape(3, 7)


class ByInput:
    """A router whose weights are the first features of each token; keeps what it gave."""

    def __init__(self, num_experts=3):
        self.num_experts = num_experts
        self.given = {}

    def weights(self, x_BTI, layer):
        w_BTE = x_BTI[..., : self.num_experts].float()
        self.given.setdefault(layer, []).append(w_BTE)
        return w_BTE


@pytest.fixture
def alike(tiny_llama, make_adapter, tokenizer):
    """All experts update the same layers."""
    adapters = [make_adapter(tiny_llama, name, seed=seed) for seed, name in enumerate("abc")]
    return Composer(tiny_llama, adapters, tokenizer=tokenizer)


def run(engine, ids_BT=IDS, **more):
    with torch.no_grad():
        return engine.model(input_ids=ids_BT, **more)


def plain(engine):
    return {layer: w_BTE.tolist() for layer, w_BTE in engine.last_weights.items()}


def test_before_any_forward_there_are_no_weights(engine):
    assert dict(engine.last_weights) == {}
    with engine.activate({"a": 1.0}):
        assert dict(engine.last_weights) == {}


def test_a_fixed_mixture_is_seen_in_every_layer_that_ran(engine):
    with engine.activate({"a": 0.5, "c": -2.0}):
        run(engine)
    used = engine.last_weights
    assert used.experts == ("a", "c")
    assert set(used) == set(engine.target_layers)
    for layer, w_BTE in used.items():
        # "a" leaves down_proj and lm_head alone
        leaves_alone = layer not in engine.pool["a"].layers
        assert w_BTE.tolist() == [[[0.0 if leaves_alone else 0.5, -2.0]]]
        assert (used.layers[layer].num_rows, used.layers[layer].num_tokens) == (3, 7)


def test_layers_without_weight_and_the_base_have_zeros(alike):
    layers = tuple(alike.target_layers)
    values_BTLE = torch.ones(1, 1, 1, 3)
    with alike.activate(MixtureWeights(values_BTLE, ("a", "b", "c"), layers[:1])):
        run(alike)
    assert [plain(alike)[layer] for layer in layers[:2]] == [[[[1.0] * 3]], [[[0.0] * 3]]]
    with alike.activate({}):
        run(alike)
    assert alike.last_weights.experts == ()
    assert plain(alike) == {layer: [[[]]] for layer in layers}


def test_a_routers_weights_are_those_that_it_gave(alike):
    router = ByInput()
    with alike.activate(router):
        run(alike)
    assert alike.last_weights.experts == ("a", "b", "c")
    assert {layer: w_BTE[-1].tolist() for layer, w_BTE in router.given.items()} == plain(alike)


def test_the_last_forward_counts_whichever_activation_it_belongs_to(alike):
    with alike.activate({"a": 1.0}):
        run(alike)
        with alike.activate({"b": 1.0}):
            assert alike.last_weights.experts == ("a",)
            run(alike)
            assert alike.last_weights.experts == ("b",)
        run(alike)
        assert alike.last_weights.experts == ("a",)


def test_another_pool_has_no_weights_yet(alike):
    with alike.activate({"a": 1.0}):
        run(alike)
    alike.swap(alike.pool)
    assert dict(alike.last_weights) == {}


def test_threads_are_apart(alike):
    barrier = threading.Barrier(2)

    def work(name):
        with alike.activate({name: 1.0}):
            run(alike)
            barrier.wait()
            return alike.last_weights.experts

    assert in_threads([partial(work, name) for name in "ab"]) == [("a",), ("b",)]
    assert dict(alike.last_weights) == {}


def test_asyncio_tasks_are_apart(alike):
    async def use(name):
        with alike.activate({name: 1.0}):
            run(alike)
            await asyncio.sleep(0)
        return alike.last_weights.experts

    async def both():
        with alike.activate({"c": 1.0}):
            run(alike)
        return await asyncio.gather(use("a"), use("b"))

    assert asyncio.run(both()) == [("a",), ("b",)]


def test_two_engines_are_apart():
    models = [nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]
    adapters = [Adapter(name, "tiny", {"0": Factors(torch.ones(1, 4), torch.ones(4, 1))}) for name in "ab"]
    first, second = (Composer(model, [adapter]) for model, adapter in zip(models, adapters, strict=True))
    with first.activate({"a": 1.0}), second.activate({"b": 2.0}):
        for model in (models[0], models[1], models[0]):
            model(torch.ones(1, 2, 4))
    assert (plain(first), plain(second)) == ({"0": [[[1.0]]]}, {"0": [[[2.0]]]})


def test_weights_by_token_are_kept_up_to_a_limit(alike, monkeypatch):
    one_layer = 3 * 7 * 3 * 4
    monkeypatch.setattr(recording, "KEPT_BYTES", len(alike.target_layers) * one_layer)
    with alike.activate(ByInput()):
        run(alike)
        run(alike)
        assert len(alike.last_weights) == len(alike.target_layers)
        run(alike, IDS.repeat(1, 2))
        with pytest.raises(CompositionError, match=r"with engine.record\(\) as trace"):
            alike.last_weights  # noqa: B018
        with alike.record() as trace:
            run(alike, IDS.repeat(1, 2))
        assert all(w_BTE.shape == (3, 14, 3) for w_BTE in trace.weights.values())
        # a smaller forward is known again
        run(alike)
        assert len(alike.last_weights) == len(alike.target_layers)


def test_nothing_of_the_graph_is_kept(alike):
    values = torch.ones(1, 1, 1, 3, requires_grad=True)
    with alike.activate(MixtureWeights(values, ("a", "b", "c"))):
        alike.model(input_ids=IDS)
    assert not any(w_BTE.requires_grad for w_BTE in alike.last_weights.values())


def test_an_engine_is_freed_with_its_last_reference(tiny_llama, make_adapter):
    engine = Composer(tiny_llama, [make_adapter(tiny_llama, "a")])
    with engine.activate({"a": 1.0}) as activation:
        run(engine)
    gone, usage = weakref.ref(engine), weakref.ref(activation.usage)
    del engine, activation
    gc.collect()
    assert (gone(), usage()) == (None, None)


def test_a_trace_joins_the_prompt_and_the_tokens_that_follow(alike):
    router = ByInput()
    with alike.activate(router), alike.record() as trace:
        alike.model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert set(trace.weights) == set(alike.target_layers)
    for layer, w_BTE in trace.weights.items():
        assert torch.equal(w_BTE, torch.cat(router.given[layer], dim=1))
        assert (trace.weights.layers[layer].num_rows, trace.weights.layers[layer].num_tokens) == (3, 10)


def test_a_trace_of_a_fixed_mixture_counts_the_tokens(alike):
    with alike.activate([{"a": 1.0}, {"b": 0.5}, None]), alike.record() as trace:
        alike.model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for layer, used in trace.weights.layers.items():
        assert trace.weights[layer][:, 0].tolist() == [[1.0, 0.0], [0.0, 0.5], [0.0, 0.0]]
        assert (used.num_rows, used.num_tokens) == (3, 10)


def test_a_trace_of_weights_by_token_has_them_call_after_call(alike):
    values_BTE = torch.randn(1, 7, 2)
    with alike.activate(MixtureWeights(values_BTE[:, :, None], ("a", "c"))), alike.record() as trace:
        run(alike)
        run(alike)
    assert trace.weights.experts == ("a", "c")
    for layer, w_BTE in trace.weights.items():
        assert torch.equal(w_BTE, values_BTE.repeat(3, 2, 1)), layer


def test_a_trace_spans_mixtures_of_different_experts(alike):
    with alike.record() as trace:
        with alike.activate({"c": 1.0}):
            run(alike, IDS[:, :2])
        with alike.activate({"a": 0.5}):
            run(alike, IDS[:, :1])
    assert trace.weights.experts == ("c", "a")
    assert all(w_BTE[2].tolist() == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.5]] for w_BTE in trace.weights.values())


def test_calls_of_different_batches_are_not_joined(alike):
    with alike.record() as trace, alike.activate({"a": 1.0}):
        run(alike)
        run(alike, IDS[:2])
    with pytest.raises(ScopeError, match="had 3, 2 rows"):
        trace.weights  # noqa: B018


def test_only_the_block_and_only_the_engine_is_recorded(alike):
    other = Composer(
        nn.Sequential(nn.Linear(4, 4)), [Adapter("x", "tiny", {"0": Factors(torch.ones(1, 4), torch.ones(4, 1))})]
    )
    with alike.record() as trace, other.activate({"x": 1.0}):
        other.model(torch.ones(1, 2, 4))
    with alike.activate({"a": 1.0}):
        run(alike)
    assert dict(trace.weights) == {}


# the name that transformers 5.3 knows
@pytest.mark.filterwarnings("ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)` is deprecated:FutureWarning")
@pytest.mark.own_models
def test_a_layer_that_the_backward_pass_runs_again_is_noted_once(alike):
    alike.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    alike.model.enable_input_require_grads()
    with alike.activate({"a": 1.0}), alike.record() as trace:
        alike.model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert {used.num_tokens for used in trace.weights.layers.values()} == {7}


def test_a_router_for_one_row_and_weights_for_another_are_both_seen(alike):
    with alike.activate([ByInput(), {"b": 0.5}, None]):
        run(alike)
    for layer, w_BTE in alike.last_weights.items():
        assert w_BTE.shape == (3, 7, 3), layer
        assert w_BTE[1:].tolist() == [[[0.0, 0.5, 0.0]] * 7, [[0.0] * 3] * 7]
        assert bool((w_BTE[0] != 0).all())


@pytest.mark.own_models
@in_whole_graphs
def test_compiled_code_is_seen_too(alike):
    torch._dynamo.reset()
    compiled = torch.compile(alike.model, backend="eager", fullgraph=True)
    for mixture in ({"a": 1.0}, {"b": 0.5}, ByInput()):
        with torch.no_grad(), alike.activate(mixture), alike.record() as trace:
            compiled(input_ids=IDS, use_cache=False)
        found, recorded = plain(alike), trace.weights.layers.values()
        with alike.activate(mixture):
            run(alike, use_cache=False)
        assert found == plain(alike)
        assert {used.num_tokens for used in recorded} == {7}


def test_reading_the_weights_of_a_lazy_pool_opens_each_expert_once(alike):
    opened = []

    def opener(name):
        opened.append(name)
        return alike.pool[name]

    names = [f"expert {number}" for number in range(40)]
    lazy = Composer(alike.model, ExpertPool.on_demand(names, lambda name: opener("abc"[names.index(name) % 3])))
    with lazy.activate(MixtureWeights(torch.ones(1, 1, 1, 40), tuple(names))):
        run(lazy)
        opened.clear()
        used = lazy.last_weights
        assert len(opened) <= 40
    assert all(w_BTE.tolist() == [[[1.0] * 40]] for w_BTE in used.values())
