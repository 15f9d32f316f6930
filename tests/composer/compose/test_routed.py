"""compose() with a router instead of a search."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

import loraweave as lw
from loraweave.errors import AdapterCorrupt, AdapterUnsupported, ScopeError, UnknownName, WeightingError
from loraweave.extensions.routers.routers.mole import Mole

EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD"), ("e f", "fe")]


@pytest.fixture
def compose(compose_on):
    return partial(compose_on, folds=2)


@pytest.fixture
def losses_under(tiny_llama, pool, losses_alone):
    """losses_under(mixture): each example's mean target loss."""

    def losses(mixture, experts=pool):
        with lw.Composer(tiny_llama, experts).activate(mixture):
            return losses_alone(tiny_llama)

    return losses


class Half:
    """Half of each of the first two experts."""

    def weights(self, x_BTI, layer):
        w_BTE = torch.zeros(1, 1, 3)
        w_BTE[..., :2] = 0.5
        return w_BTE


def test_the_weights_of_the_composition_are_the_router(compose, losses_under, pool):
    composed = compose(method="arrow", top_k=2)
    router = lw.router("arrow", pool, top_k=2)
    assert composed.weights.name == "arrow"
    assert composed.weights.options == router.options
    assert composed.mean_weights == {}
    assert not composed.is_base
    expected = losses_under(router)
    assert composed.losses() == pytest.approx(expected, rel=1e-4)
    row = composed.report["arrow"]
    assert row.loss == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert (row.weights, row.num_trained, row.evaluations) == ({}, 0, 1)


def test_the_report_has_base_best_single_and_uniform_beside_it(compose, losses_under):
    report = compose(method="arrow").report
    assert [row.name for row in report.rows] == ["base", "best_single", "uniform", "arrow"]
    assert report.chosen == "arrow"
    base = losses_under({})
    assert report["base"].loss == pytest.approx(sum(base) / len(base), rel=1e-4)
    report.table()


def test_answers_are_live(compose):
    composed = compose(method="arrow")
    assert len(composed.predict(["a b"])) == 1
    assert composed.evaluate(EXAMPLES)["count"] == 5


def test_without_an_expert_the_others_have_the_weights_that_the_router_gives(compose, losses_under):
    composed = compose(method="arrow", top_k=2)
    router = composed.weights

    class Without:
        def weights(self, x_BTI, layer):
            w_BTE = router.weights(x_BTI, layer)
            return torch.stack([w_BTE[..., 0], 0 * w_BTE[..., 1], w_BTE[..., 2]], dim=-1)

    rise = composed.leave_one_out()
    assert list(rise) == ["a", "b", "c"]
    whole, without = (losses_under(each) for each in (router, Without()))
    assert rise["b"] == pytest.approx((sum(without) - sum(whole)) / len(whole), abs=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda composed, folder: composed.adapter,
        lambda composed, folder: composed.export(folder),
        lambda composed, folder: composed.cut(1),
        lambda composed, folder: composed.tune(1, progress=False),
        lambda composed, folder: composed.prune(),
    ],
)
def test_what_needs_weights_that_do_not_vary_is_refused_with_the_way_out(compose, call, tmp_path):
    composed = compose(method="arrow")
    with pytest.raises(ScopeError, match=r"router 'arrow' cannot .*engine.activate\(composition\.weights\)"):
        call(composed, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [name for name in ("arrow", "lag") if name in lw.names("routers")])
def test_saved_and_read_again_it_answers_the_same(compose, method, tokenizer, pool, tmp_path, make_model):
    composed = compose(method=method)
    folder = composed.save_pretrained(tmp_path / "composed")
    again = lw.Composition.from_pretrained(folder, make_model("llama"), tokenizer)
    assert again.losses() == composed.losses()
    assert again.report.to_json() == composed.report.to_json()
    assert again.pool.names == pool.names
    second = again.save_pretrained(tmp_path / "second")
    assert json.loads((second / "composition.json").read_text()) == json.loads((folder / "composition.json").read_text())


def test_a_saved_composition_without_its_adapters_is_refused(compose, tiny_llama, tokenizer, pool, tmp_path):
    folder = compose(method="arrow").save_pretrained(tmp_path / "composed")
    lw.router("arrow", pool).save_pretrained(folder / "router")
    with pytest.raises(AdapterCorrupt, match="a router without its adapters"):
        lw.Composition.from_pretrained(folder, tiny_llama, tokenizer)


def test_a_router_that_was_made_already_is_taken_as_it_is(compose, losses_under, pool):
    router = lw.router("arrow", pool, temperature=0.3)
    assert compose(method=router).weights is router
    turned = pool.subset(["c", "a", "b"])
    composed = compose(turned, method=router)
    assert composed.weights.experts == ("c", "a", "b")
    expected = losses_under(router)
    assert composed.losses() == pytest.approx(expected, rel=1e-4)


def test_a_router_of_ones_own_makes_a_composition_that_answers(compose, losses_under, tmp_path):
    composed = compose(method=Half())
    assert composed.report.chosen == "Half"
    expected = losses_under({"a": 0.5, "b": 0.5})
    assert composed.losses() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ScopeError, match="cannot write router 'Half' to a file"):
        composed.save_pretrained(tmp_path / "composed")
    assert not list(tmp_path.iterdir())


def test_fusing_a_router_is_refused_with_the_way_out(tiny_llama, pool):
    engine = lw.Composer(tiny_llama, pool)
    with pytest.raises(ScopeError, match=r"router Arrow.*activate\(\) them instead"), engine.fused(lw.router("arrow", pool)):
        pass


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "arow"}, UnknownName, "did you mean 'arrow'"),
        ({"method": "mass"}, UnknownName, "it was withdrawn, .*make 'arrow' or 'spectr'"),
        ({"method": 5}, WeightingError, "method is 5; give the name of"),
        ({"method": lw.MixtureWeights.of({"a": 1.0}, ["a"])}, WeightingError, "method='manual'"),
        ({"method": Half(), "top_k": 2}, WeightingError, "method 'Half' has no option 'top_k'"),
        ({"method": "arrow", "top_q": 2}, WeightingError, "has no option 'top_q'.*did you mean 'top_k'"),
        ({"method": "mole", "steps": 0}, WeightingError, "steps of method 'mole' is 0"),
        ({"method": "mole", "folds": 1}, WeightingError, "would hold out every example"),
        ({"method": "arrow", "steps": 2}, WeightingError, "has no option 'steps'"),
        ({"method": "arrow", "top_k": 9}, WeightingError, "router 'arrow' got top_k=9"),
        ({"method": "arrow", "space": "factors"}, WeightingError, "leave space out"),
        ({"method": "arrow", "objective": "exact_match"}, WeightingError, "leave objective out"),
        ({"method": "arrow", "l1": 0.1}, WeightingError, "leave l1 out"),
        ({"method": "arrow", "weights": {"a": 1.0}}, WeightingError, "method 'manual' takes weights"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(compose, options, error, message):
    with pytest.raises(error, match=message):
        compose(**options)


def test_a_router_that_was_made_is_refused_for_a_hub_and_for_other_experts(compose, pool, tmp_path):
    router = lw.router("arrow", pool)
    with pytest.raises(WeightingError, match="pass the pool that it was made for"):
        compose(lw.Hub(tmp_path / "hub"), method=router)
    with pytest.raises(WeightingError, match="missing from the pool: 'b'"):
        compose(pool.without("b"), method=router)
    with pytest.raises(WeightingError, match="has no option 'top_k'"):
        compose(method=router, top_k=1)


def test_a_router_is_made_for_what_retrieval_finds(compose, tiny_llama, pool, tmp_path):
    hub = lw.Hub(tmp_path / "hub")
    tiny_llama.name_or_path = "tiny"
    for adapter in pool.adapters.values():
        hub.add(adapter, description="swap letters", anomalies="off")
    composed = compose(hub, method="arrow", k=2)
    assert len(composed.weights.experts) == 2
    assert composed.weights.experts == composed.pool.names


def test_adapters_with_magnitudes_are_routed_and_not_written(compose, losses_under, dora_pool, tmp_path):
    composed = compose(dora_pool, method="arrow")
    expected = losses_under(composed.weights, dora_pool)
    assert composed.losses() == pytest.approx(expected, rel=1e-4)
    assert compose(dora_pool, method=composed.weights).losses() == composed.losses()
    with pytest.raises(AdapterUnsupported):
        composed.save_pretrained(tmp_path / "composed")
    assert not list(tmp_path.iterdir())


def own_loss(losses, examples):
    """The mean of the losses of these examples."""
    return sum(losses[EXAMPLES.index(pair)] for pair in examples) / len(examples)


def test_a_learned_router_is_trained_on_what_each_fold_sees(compose, losses_under, pool, tmp_path, monkeypatch):
    calls = []

    def fit(engine, router, dataset, **settings):
        calls.append((list(dataset.examples), settings, [p.detach().clone() for p in router.parameters()], router))
        true_fit(engine, router, dataset, **settings)

    true_fit = lw.Composer.fit
    monkeypatch.setattr(lw.Composer, "fit", fit)
    composed = compose(method="mole", budget=14, lr=0.02, seed=5, checkpoint=tmp_path / "kept")
    *folds, (rows, settings, _, _) = calls
    assert rows == EXAMPLES
    held = [[row for row in EXAMPLES if row not in seen] for seen, *_ in folds]
    assert sorted(row for part in held for row in part) == sorted(EXAMPLES)
    assert (settings["steps"], settings["lr"], settings["seed"], settings["batch_size"]) == (4, 0.02, 5, 5)
    begun = [parameters for _, _, parameters, _ in calls]
    assert all(torch.equal(a, b) for other in begun[1:] for a, b in zip(begun[0], other, strict=True))
    row = composed.report["mole"]
    assert row.num_trained == sum(p.numel() for p in lw.router("mole", pool).parameters())
    assert row.evaluations == 3 * 3 * 4
    losses = [own_loss(losses_under(call[3]), part) for call, part in zip(folds, held, strict=True)]
    expected = sum(loss * len(part) for loss, part in zip(losses, held, strict=True)) / len(EXAMPLES)
    assert row.held_out_loss == pytest.approx(expected, rel=1e-4)
    assert row.loss == pytest.approx(own_loss(losses_under(calls[-1][3]), EXAMPLES), rel=1e-4)


def test_a_router_that_needs_rows_of_experts_is_refused_by_name(compose, pool, monkeypatch):
    monkeypatch.setattr(Mole, "needs_experts", True)
    with pytest.raises(WeightingError, match=r"'mole' learns from rows that name their expert.*method=router"):
        compose(method="mole")
    assert compose(method=lw.router("mole", pool)).report.chosen == "mole"


def test_the_same_seed_trains_the_same_router(compose):
    first, second = (compose(method="mole", steps=2, folds=0, seed=3).losses() for _ in range(2))
    assert first == second


def test_a_learned_router_that_is_worse_on_held_out_examples_gives_way(compose):
    composed = compose(method="mole", steps=1)
    report = composed.report
    plain = min(("base", "best_single"), key=lambda name: report[name].held_out_loss)
    worse = report["mole"].held_out_loss > report[plain].held_out_loss
    assert report.chosen == (plain if worse else "mole")
    assert (composed.router is None) == worse


def test_a_learned_composition_is_read_again_with_what_it_learned(compose, tiny_llama, tokenizer, tmp_path):
    composed = compose(method="mole", steps=3, folds=0)
    assert composed.report.chosen == "mole"
    again = lw.Composition.from_pretrained(composed.save_pretrained(tmp_path / "composed"), tiny_llama, tokenizer)
    assert again.losses() == composed.losses()
    assert again.router.training_report == composed.router.training_report
    assert len(again.router.training_report.losses) == 3
