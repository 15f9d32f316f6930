"""Candidates in the order of what the model makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import loraweave as lw
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.compose.rerank import first_order, update_norm
from loraweave.errors import AdapterUnsupported, InvalidTask, SearchFailed, UnknownExpert, UnknownName, WeightingError
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Candidate, Record

EXAMPLES = [("a dog", "one"), ("two birds", "two"), ("x", "12")]
WAYS = ("first_order", "gradient_similarity", "probe")


def candidates_for(names):
    return [
        Candidate(name, 0.5, f"description {name!r} (0.50)", Record(name, "", "tiny", 3, (), None, (), "", 0, ""))
        for name in names
    ]


@pytest.fixture
def candidates(pool):
    return candidates_for(pool.names)


def test_first_order_scores_are_the_falls_that_the_slopes_promise(tiny_llama, tokenizer, pool, candidates):
    slopes = first_order(lw.Composer(tiny_llama, pool), tokenizer, lw.Task(EXAMPLES)).slopes
    found = lw.rerank(tiny_llama, tokenizer, pool, EXAMPLES, candidates, weight=0.5, around="base")
    assert [c.name for c in found] == sorted(slopes, key=lambda name: slopes[name])
    assert [c.score for c in found] == [pytest.approx(-0.5 * slopes[c.name]) for c in found]


def test_by_default_the_slopes_are_those_at_the_uniform_mixture(tiny_llama, tokenizer, pool, candidates):
    uniform = dict.fromkeys(pool.names, 0.6 / 3)
    there = first_order(lw.Composer(tiny_llama, pool), tokenizer, lw.Task(EXAMPLES), mixture=uniform)
    found = lw.rerank(tiny_llama, tokenizer, pool, EXAMPLES, candidates, weight=0.6)
    assert {c.name: c.score for c in found} == {name: pytest.approx(-0.6 * s) for name, s in there.slopes.items()}
    assert found[0].evidence.startswith(f"loss {there.loss:.3f} of the uniform mixture begins to change by ")


def test_gradient_similarity_is_the_slope_by_the_norm_of_the_update(tiny_llama, tokenizer, pool, candidates):
    engine = lw.Composer(tiny_llama, pool)
    slopes = first_order(engine, tokenizer, lw.Task(EXAMPLES)).slopes
    want = {name: -slope / update_norm(engine, name) for name, slope in slopes.items()}
    found = lw.rerank(tiny_llama, tokenizer, pool, EXAMPLES, candidates, by="gradient_similarity", around="base")
    assert {c.name: c.score for c in found} == pytest.approx(want)
    assert [c.name for c in found] == sorted(want, key=lambda name: -want[name])


def test_gradient_similarity_does_not_see_the_length_of_an_update(tiny_llama, tokenizer, pool, candidates):
    longer = lw.ExpertPool({name: lw.scale(pool[name], 3.0) for name in pool.names})
    short, long = (
        lw.rerank(tiny_llama, tokenizer, p, EXAMPLES, candidates, by="gradient_similarity", around="base")
        for p in (pool, longer)
    )
    assert [c.score for c in long] == pytest.approx([c.score for c in short], rel=1e-5)


def test_a_probe_scores_by_the_measured_fall_of_the_loss(tiny_llama, tokenizer, pool, candidates):
    objective = ExampleLoss(lw.Composer(tiny_llama, pool), tokenizer, lw.Task(EXAMPLES), l1=0.0)
    mixtures = [{}, *({name: 0.1} for name in pool.names)]
    base, *losses = (objective([MixtureWeights.of(mixture, pool.names)])[0] for mixture in mixtures)
    found = lw.rerank(tiny_llama, tokenizer, pool, EXAMPLES, candidates, by="probe", weight=0.1)
    assert {c.name: c.score for c in found} == pytest.approx(
        {name: base - loss for name, loss in zip(pool.names, losses, strict=True)}, abs=1e-5
    )


def test_near_weight_zero_the_first_order_is_the_probe(make_model, make_adapters, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    pool = lw.ExpertPool(make_adapters(model, "llama"))
    known = candidates_for(pool.names)
    promised, measured = (
        {c.name: c.score for c in lw.rerank(model, tokenizer, pool, EXAMPLES, known, by=by, weight=1e-4, around="base")}
        for by in ("first_order", "probe")
    )
    # the losses are taken in fp32, so that a difference of 1e-4 has two digits
    assert measured == pytest.approx(promised, rel=0.05, abs=2e-6)


@pytest.mark.parametrize("by", WAYS)
def test_evidence_says_what_was_measured_and_keeps_what_the_search_said(tiny_llama, tokenizer, pool, candidates, by):
    for found in lw.rerank(tiny_llama, tokenizer, pool, EXAMPLES, candidates, by=by):
        assert found.evidence.startswith("loss ")
        assert found.evidence.endswith(f"; description {found.name!r} (0.50)")


def test_a_hub_s_own_candidates_are_reranked(tiny_llama, tokenizer, pool, tmp_path):
    tiny_llama.name_or_path = "tiny"
    with lw.Hub(tmp_path / "hub") as hub:
        for adapter in pool.adapters.values():
            hub.add(adapter, description=f"does {adapter.name}")
        hits = lw.Retriever(hub, embedder="hashing").candidates("does b", k=2)
        found = lw.rerank(tiny_llama, tokenizer, hub, EXAMPLES, hits)
    assert sorted(c.name for c in found) == sorted(c.name for c in hits)
    assert {c.name: c.record for c in found} == {c.name: c.record for c in hits}


def test_equal_scores_keep_the_order_of_the_search(tiny_llama, tokenizer, pool):
    same = lw.ExpertPool(dict.fromkeys(("z", "y", "x"), pool["a"]))
    found = lw.rerank(tiny_llama, tokenizer, same, EXAMPLES, candidates_for(["y", "z", "x"]))
    assert [c.name for c in found] == ["y", "z", "x"]


def test_no_candidates_stay_none_and_load_nothing(tokenizer):
    assert lw.rerank(None, tokenizer, None, EXAMPLES, []) == []


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_candidate_that_breaks_the_model_is_last(tiny_llama, tokenizer, pool):
    broken = {name: replace(f, b_OR=torch.full_like(f.b_OR, 1e38)) for name, f in pool["a"].layers.items()}
    both = lw.ExpertPool({"broken": replace(pool["a"], layers=broken), "a": pool["a"]})
    found = lw.rerank(tiny_llama, tokenizer, both, EXAMPLES, candidates_for(both.names), by="probe")
    assert [(c.name, c.score == float("-inf")) for c in found] == [("a", False), ("broken", True)]
    only = both.subset(["broken"])
    with pytest.raises(SearchFailed, match="none of the 1 candidates"):
        lw.rerank(tiny_llama, tokenizer, only, EXAMPLES, candidates_for(["broken"]), by="probe")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"by": "first-order"}, UnknownName, "did you mean 'first_order'"),
        ({"around": "unifrom"}, UnknownName, "no place 'unifrom' to rerank around, did you mean 'uniform'"),
        ({"weight": 0.0}, WeightingError, "weight is 0.0"),
        ({"weight": float("nan")}, WeightingError, r"rerank\(\) got weight=nan; it takes a finite number"),
        ({"batch_size": 0}, WeightingError, "got batch_size=0; it takes a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be_used_are_named_before_anything_runs(tokenizer, options, error, said):
    with pytest.raises(error, match=said):
        lw.rerank(None, tokenizer, None, EXAMPLES, candidates_for(["a"]), **options)


def test_a_task_without_examples_and_a_name_that_the_pool_has_not_are_refused(tiny_llama, tokenizer, pool):
    with pytest.raises(InvalidTask, match="no examples to rerank by"):
        lw.rerank(tiny_llama, tokenizer, pool, [], candidates_for(["a"]))
    with pytest.raises(UnknownExpert, match="no expert 'q'"):
        lw.rerank(tiny_llama, tokenizer, pool, EXAMPLES, candidates_for(["a", "q"]))


def test_an_adapter_with_a_trained_head_is_refused_by_name(tiny_llama, tokenizer, pool):
    headed = lw.ExpertPool({"headed": replace(pool["a"], heads={"lm_head.weight": torch.ones(61, 16)})})
    with pytest.raises(AdapterUnsupported, match="'headed' has a trained head"):
        lw.rerank(tiny_llama, tokenizer, headed, EXAMPLES, candidates_for(["headed"]))


@pytest.mark.slow
def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/reranking.md")
    assert {c.name for c in names["exact"]} == {"passive", "negation", "antonym", "past_tense", "plural"}
    assert names["exact"][0].name == "passive"
    assert names["exact"][0].evidence.count("loss ") == 2
