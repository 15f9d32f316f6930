"""Candidates in the order of what the model makes of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import loraweave as lw
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.composer import Composer
from loraweave.composer.model.batches import IGNORED, batch, encode, mean_losses, target_logits
from loraweave.errors import (
    AdapterUnsupported,
    AlreadyActive,
    CompositionError,
    InvalidTask,
    SearchFailed,
    UnknownExpert,
    UnknownName,
    WeightingError,
)
from loraweave.extensions.reranking import first_order, ranking, rerank
from loraweave.hub.adapter import Adapter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Candidate, Factors, Record, Task

EXAMPLES = [("a dog", "one"), ("two birds", "two"), ("x", "12")]
WAYS = ("first_order", "probe")


def candidates_for(names):
    return [
        Candidate(name, 0.5, f"description {name!r} (0.50)", Record(name, "", "tiny", 3, (), None, (), "", 0, ""))
        for name in names
    ]


@pytest.fixture
def candidates(pool):
    return candidates_for(pool.names)


def test_first_order_scores_are_the_falls_that_slopes_at_the_uniform_mixture_promise(
    tiny_llama, tokenizer, pool, candidates
):
    uniform = dict.fromkeys(pool.names, 0.6 / 3)
    there = first_order(lw.Composer(tiny_llama, pool), tokenizer, lw.Task(EXAMPLES), mixture=uniform)
    found = rerank(tiny_llama, tokenizer, pool, EXAMPLES, candidates, weight=0.6)
    assert [c.name for c in found] == sorted(there.slopes, key=lambda name: there.slopes[name])
    assert {c.name: c.score for c in found} == {name: pytest.approx(-0.6 * s) for name, s in there.slopes.items()}
    assert found[0].evidence.startswith(f"loss {there.loss:.3f} of the uniform mixture begins to change by ")


def test_a_probe_scores_by_the_measured_fall_of_the_loss(tiny_llama, tokenizer, pool, candidates):
    objective = ExampleLoss(lw.Composer(tiny_llama, pool), tokenizer, lw.Task(EXAMPLES), l1=0.0)
    mixtures = [{}, *({name: 0.1} for name in pool.names)]
    base, *losses = (objective([MixtureWeights.of(mixture, pool.names)])[0] for mixture in mixtures)
    found = rerank(tiny_llama, tokenizer, pool, EXAMPLES, candidates, by="probe", weight=0.1)
    assert {c.name: c.score for c in found} == pytest.approx(
        {name: base - loss for name, loss in zip(pool.names, losses, strict=True)}, abs=1e-5
    )


@pytest.mark.usefixtures("warm_workers")
@pytest.mark.parametrize("by", WAYS)
def test_pieces_on_workers_score_as_one_process_does(by, make_model, make_adapters, tokenizer, tmp_path, monkeypatch):
    for part in (make_model("llama"), tokenizer):
        part.save_pretrained(tmp_path / "base")
    model, tokenizer = lw.load_base(tmp_path / "base")
    adapters = [replace(adapter, base_model=model.name_or_path) for adapter in make_adapters(model, "llama")]
    listed = candidates_for([adapter.name for adapter in adapters])
    asked = {"by": by, "weight": 0.5, "progress": False}
    with lw.Hub(tmp_path / "hub") as hub:
        hub.add_many(adapters)
        whole = rerank(model, tokenizer, hub, EXAMPLES, listed, **asked)
        monkeypatch.setattr(ranking, "PIECE", 2)
        alone = rerank(model, tokenizer, hub, EXAMPLES, listed, **asked)
        # processes take seconds to start
        spread = rerank(model, tokenizer, hub, EXAMPLES, listed, n_jobs=2 if by == "probe" else 1, **asked)
    assert spread == alone
    assert [each.name for each in alone] == [each.name for each in whole]
    assert [each.score for each in alone] == pytest.approx([each.score for each in whole], abs=1e-5)


def test_near_weight_zero_the_first_order_is_the_probe(make_model, make_adapters, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    pool = lw.ExpertPool(make_adapters(model, "llama"))
    known = candidates_for(pool.names)
    promised, measured = (
        {c.name: c.score for c in rerank(model, tokenizer, pool, EXAMPLES, known, by=by, weight=1e-4)}
        for by in ("first_order", "probe")
    )
    # the losses are taken in fp32, so that a difference of 1e-4 has two digits
    assert measured == pytest.approx(promised, rel=0.05, abs=2e-6)


@pytest.mark.parametrize("by", WAYS)
def test_evidence_says_what_was_measured_and_keeps_what_the_search_said(tiny_llama, tokenizer, pool, candidates, by):
    for found in rerank(tiny_llama, tokenizer, pool, EXAMPLES, candidates, by=by):
        assert found.evidence.startswith("loss ")
        assert found.evidence.endswith(f"; description {found.name!r} (0.50)")


def test_a_hub_s_own_candidates_are_reranked(tiny_llama, tokenizer, pool, tmp_path):
    tiny_llama.name_or_path = "tiny"
    with lw.Hub(tmp_path / "hub") as hub:
        for adapter in pool.adapters.values():
            hub.add(adapter, description=f"does {adapter.name}")
        hits = lw.Retriever(hub, embedder="hashing").candidates("does b", k=2)
        found = rerank(tiny_llama, tokenizer, hub, EXAMPLES, hits)
    assert sorted(c.name for c in found) == sorted(c.name for c in hits)
    assert {c.name: c.record for c in found} == {c.name: c.record for c in hits}


def test_equal_scores_keep_the_order_of_the_search(tiny_llama, tokenizer, pool):
    same = lw.ExpertPool(dict.fromkeys(("z", "y", "x"), pool["a"]))
    found = rerank(tiny_llama, tokenizer, same, EXAMPLES, candidates_for(["y", "z", "x"]))
    assert [c.name for c in found] == ["y", "z", "x"]


def test_no_candidates_stay_none_and_load_nothing(tokenizer):
    assert rerank(None, tokenizer, None, EXAMPLES, []) == []


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_candidate_that_breaks_the_model_is_last(tiny_llama, tokenizer, pool):
    broken = {name: replace(f, b_OR=torch.full_like(f.b_OR, 1e38)) for name, f in pool["a"].layers.items()}
    both = lw.ExpertPool({"broken": replace(pool["a"], layers=broken), "a": pool["a"]})
    found = rerank(tiny_llama, tokenizer, both, EXAMPLES, candidates_for(both.names), by="probe")
    assert [(c.name, c.score == float("-inf")) for c in found] == [("a", False), ("broken", True)]
    only = both.subset(["broken"])
    with pytest.raises(SearchFailed, match="none of the 1 candidates"):
        rerank(tiny_llama, tokenizer, only, EXAMPLES, candidates_for(["broken"]), by="probe")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"by": "first-order"}, UnknownName, "did you mean 'first_order'"),
        ({"weight": 0.0}, WeightingError, "weight is 0.0"),
        ({"weight": float("nan")}, WeightingError, r"rerank\(\) got weight=nan; it takes a finite number"),
        ({"batch_size": 0}, WeightingError, "got batch_size=0; it takes a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be_used_are_named_before_anything_runs(tokenizer, options, error, said):
    with pytest.raises(error, match=said):
        rerank(None, tokenizer, None, EXAMPLES, candidates_for(["a"]), **options)


def test_a_task_without_examples_and_a_name_that_the_pool_has_not_are_refused(tiny_llama, tokenizer, pool):
    with pytest.raises(InvalidTask, match="no examples to rerank by"):
        rerank(tiny_llama, tokenizer, pool, [], candidates_for(["a"]))
    with pytest.raises(UnknownExpert, match="no expert 'q'"):
        rerank(tiny_llama, tokenizer, pool, EXAMPLES, candidates_for(["a", "q"]))


def test_an_adapter_with_a_trained_head_is_refused_by_name(tiny_llama, tokenizer, pool):
    headed = lw.ExpertPool({"headed": replace(pool["a"], heads={"lm_head.weight": torch.ones(61, 16)})})
    with pytest.raises(AdapterUnsupported, match="'headed' has a trained head"):
        rerank(tiny_llama, tokenizer, headed, EXAMPLES, candidates_for(["headed"]))


@pytest.mark.slow
def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/extensions/reranking.md")
    assert {c.name for c in names["exact"]} == {"passive", "negation", "antonym", "past_tense", "plural"}
    assert names["exact"][0].name == "passive"
    assert names["exact"][0].evidence.count("loss ") == 2


TASK = Task([("a dog", "one"), ("two birds sing", "two"), ("x", "a long answer 12"), ("cats", "b")])
KINDS = ("llama", "gpt2", "t5")


def adapters_of_all_parts(make_model, make_adapters, kind):
    """Plain ones, and one that also has gains and biases."""
    model = make_model(kind, dtype=torch.float64)
    plain = make_adapters(model, kind)
    generator = torch.Generator().manual_seed(9)
    parts = {
        layer: Factors(
            factors.a_RI,
            factors.b_OR,
            gain_O=torch.randn(len(factors.b_OR), generator=generator) * 0.3,
            bias_O=torch.randn(len(factors.b_OR), generator=generator) * 0.3,
        )
        for layer, factors in plain[2].layers.items()
    }
    return model, [*plain, Adapter("with gain and bias", "tiny", parts)]


def encoded(model, tokenizer, task):
    rows = encode(model, tokenizer, [task.prompt(text) for text, _ in task.examples], [t for _, t in task.examples])
    return batch(model, tokenizer, rows)


def losses_of(model, tokenizer, task):
    return mean_losses(model, encoded(model, tokenizer, task)).mean()


def exact_loss(model, tokenizer, task):
    """The loss with no step of it in fp32, so that small differences keep their digits."""
    prepared = encoded(model, tokenizer, task)
    log_p_BKV = target_logits(model, prepared).double().log_softmax(dim=2)
    losses = []
    for row_KV, target_K in zip(log_p_BKV, prepared.targets_BK, strict=True):
        real_K = target_K != IGNORED
        losses.append(-row_KV[real_K, target_K[real_K]].mean())
    return float(torch.stack(losses).mean())


def assert_slopes_are_those_of_autograd(engine, tokenizer, at=None, **options):
    """Through the weights of the live mixture, which are 0 unless `at` has them."""
    names = engine.pool.names
    weights = torch.tensor([(at or {}).get(name, 0.0) for name in names], dtype=torch.float64).requires_grad_()
    with engine.activate(MixtureWeights(weights.view(1, 1, 1, -1), names)):
        loss = losses_of(engine.model, tokenizer, TASK)
        loss.backward()
    found = first_order(engine, tokenizer, TASK, mixture=at, **options)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-5 if at else 1e-6)
    assert list(found.slopes) == list(names)
    slope_E = torch.tensor(list(found.slopes.values()), dtype=torch.float64)
    torch.testing.assert_close(slope_E, weights.grad, rtol=1e-4 if at else 1e-5, atol=1e-5 if at else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 3}, {"at": {"a": 0.3, "b": -0.2, "with gain and bias": 0.1}}], ids=str
)
def test_slopes_are_those_of_autograd(make_model, make_adapters, tokenizer, kind, options):
    model, adapters = adapters_of_all_parts(make_model, make_adapters, kind)
    assert_slopes_are_those_of_autograd(Composer(model, adapters), tokenizer, **options)


def test_slopes_of_an_embedding_are_those_of_autograd(make_model, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    generator = torch.Generator().manual_seed(9)
    a_RI, b_OR, gain_O = (torch.randn(*shape, generator=generator) * 0.3 for shape in ((2, 61), (16, 2), (16,)))
    factors = Factors(a_RI, b_OR, gain_O=gain_O, kind="embedding")
    engine = Composer(model, [Adapter("a", "tiny", {"model.embed_tokens": factors})])
    assert_slopes_are_those_of_autograd(engine, tokenizer, batch_size=3)


def test_slopes_at_the_base_are_the_gradients_of_the_loss_at_weight_zero(make_model, make_adapters, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    engine = Composer(model, make_adapters(model, "llama"))
    loss = ExampleLoss(engine, tokenizer, TASK, l1=0.0)
    (value,), (gradient,) = loss.gradients([MixtureWeights(torch.zeros(1, 1, 1, 3), ("a", "b", "c"))])
    begun = first_order(engine, tokenizer, TASK)
    # which takes its losses in fp32
    assert value == pytest.approx(begun.loss, rel=1e-5)
    assert gradient.flatten().tolist() == pytest.approx([begun.slopes[name] for name in "abc"], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_slopes_are_the_difference_quotients_of_the_dense_model(
    make_model, make_adapters, with_dense_update, tokenizer, kind
):
    model = make_model(kind, dtype=torch.float64)
    adapters = make_adapters(model, kind)
    slopes = first_order(Composer(model, adapters), tokenizer, TASK).slopes
    for adapter in adapters:
        with torch.no_grad():
            up, down = (
                exact_loss(with_dense_update(kind, [adapter], [step], dtype=torch.float64), tokenizer, TASK)
                for step in (1e-4, -1e-4)
            )
        # llama normalises in fp32 whatever the model's dtype
        assert slopes[adapter.name] == pytest.approx((up - down) / 2e-4, rel=3e-3, abs=1e-3)


def test_a_trained_magnitude_counts_as_the_base_at_hand_resolves_it(make_model, make_adapter, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    plain = make_adapter(model, "dora")
    layers = {name: Factors(f.a_RI, f.b_OR, magnitude_O=torch.rand(len(f.b_OR)) + 0.5) for name, f in plain.layers.items()}
    engine = Composer(model, [Adapter("dora", "tiny", layers)])
    assert_slopes_are_those_of_autograd(engine, tokenizer)


def test_padding_does_not_count(make_model, make_adapters, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    engine = Composer(model, make_adapters(model, "llama"))
    together = first_order(engine, tokenizer, TASK, batch_size=4)
    alone = [first_order(engine, tokenizer, Task([example])) for example in TASK.examples]
    for name, slope in together.slopes.items():
        assert slope == pytest.approx(sum(one.slopes[name] for one in alone) / len(alone), rel=1e-6)


def test_the_order_of_the_pool_does_not_matter(make_model, make_adapters, tokenizer):
    model = make_model("gpt2", dtype=torch.float64)
    adapters = make_adapters(model, "gpt2")
    first = first_order(Composer(model, adapters), tokenizer, TASK).slopes
    second = first_order(Composer(model, adapters[::-1]), tokenizer, TASK).slopes
    assert first == {name: pytest.approx(slope, rel=1e-9) for name, slope in second.items()}


def test_a_layer_that_runs_twice_has_the_slope_of_both_calls(make_model, make_adapter, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    engine = Composer(model, [make_adapter(model, "a", targets=("down_proj",))])
    assert_slopes_are_those_of_autograd(engine, tokenizer)


def test_bf16_slopes_are_near_those_of_float64(make_model, make_adapters, tokenizer):
    exact, near = (
        first_order(Composer(model, make_adapters(model, "llama")), tokenizer, TASK).slopes
        for model in (make_model("llama", dtype=torch.float64), make_model("llama", dtype=torch.bfloat16))
    )
    size = max(abs(slope) for slope in exact.values())
    assert all(abs(near[name] - slope) < 0.1 * size for name, slope in exact.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was(make_model, make_adapters, tokenizer, kind):
    model = make_model(kind)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        first_order(Composer(model, make_adapters(model, kind)), tokenizer, TASK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_an_error_in_the_backward_pass_leaves_the_model_as_it_was(tiny_llama, make_adapter, tokenizer, monkeypatch):
    engine = Composer(tiny_llama, [make_adapter(tiny_llama, "a")])
    monkeypatch.setattr("loraweave.extensions.reranking.ranking._Slopes.receive", lambda self, gradient, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first_order(engine, tokenizer, TASK)
    assert not engine.active
    assert all(not module._forward_hooks for module in tiny_llama.modules())
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


def test_another_composer_that_is_active_is_no_base_to_measure_on(tiny_llama, make_adapter, tokenizer):
    adapter = make_adapter(tiny_llama, "a")
    with Composer(tiny_llama, [adapter]).activate({"a": 1.0}), pytest.raises(AlreadyActive):
        first_order(Composer(tiny_llama, [adapter]), tokenizer, TASK)


@pytest.mark.own_models
def test_a_loss_that_is_not_finite_is_named(tiny_llama, make_adapter, tokenizer):
    engine = Composer(tiny_llama, [make_adapter(tiny_llama, "a")])
    with torch.no_grad():
        tiny_llama.model.norm.weight.fill_(math.nan)
    with pytest.raises(CompositionError, match="loss on the examples is nan"):
        first_order(engine, tokenizer, TASK)
