"""A composition made smaller, trained on or exported: what is left out, what it costs, and that answers follow."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import loraweave as lw
import loraweave.cli
from loraweave.cli import compositions
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.report import Report
from loraweave.composer.composer import Composer
from loraweave.composer.model.batches import batch, encode, mean_losses
from loraweave.errors import AdapterUnsupported, CompositionError, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.types import Task

EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD"), ("e f", "fe")]


@pytest.fixture
def composed(tiny_llama, tokenizer, pool):
    task = lw.Task(EXAMPLES, instruction="swap")
    report = Report((), "manual", "as asked", (), 0.0, 0)

    def make(weights, by_layer=None):
        return lw.Composition(tiny_llama, tokenizer, task, pool, weights, "linear", report, by_layer=by_layer)

    return make


@torch.no_grad()
def loss_of(composition, model):
    task, tokenizer = composition.task, composition.tokenizer
    rows = encode(model, tokenizer, [task.prompt(text) for text, _ in EXAMPLES], [target for _, target in EXAMPLES])
    return float(torch.stack([mean_losses(model, batch(model, tokenizer, [row]))[0] for row in rows]).mean())


def dense_by_layer(make_model, pool, by_layer):
    """The model with each layer's own weights written densely into it."""
    model = make_model("llama")
    with torch.no_grad():
        for layer, weights in by_layer.items():
            for name, weight in weights.items():
                if layer in pool[name].layers:
                    model.get_submodule(layer).weight += weight * pool[name].delta(layer)
    return model


def test_leaving_one_out_is_the_difference_of_losses_with_and_without(composed, pool, with_dense_update):
    weights = {"a": 0.8, "b": -0.4, "c": 0.5}
    found = composed(weights).leave_one_out()

    def dense(given):
        adapters = list(pool.adapters.values())
        return loss_of(composed(weights), with_dense_update("llama", adapters, [given.get(n, 0.0) for n in pool.names]))

    whole = dense(weights)
    for name in weights:
        rest = {other: weight for other, weight in weights.items() if other != name}
        assert found[name] == pytest.approx(dense(rest) - whole, abs=2e-4)


def test_an_adapter_without_effect_is_left_out_and_those_that_matter_stay(composed):
    # of either sign the one that helps
    signs = {n: min((1.0, -1.0), key=lambda sign, n=n: sum(composed({n: 0.02 * sign}).losses())) for n in ("a", "c")}
    composition = composed({"a": 0.02 * signs["a"], "b": 1e-6, "c": 0.02 * signs["c"]})
    rises = composition.leave_one_out()
    assert min(rises["a"], rises["c"]) > 1e-4 > abs(rises["b"])
    pruned = composition.prune(1e-5)
    assert set(pruned.weights) == {"a", "c"}
    assert pruned.report["pruned"].loss == pytest.approx(sum(composition.losses()) / 5, abs=1e-4)
    assert "1 of 3 adapters left out" in pruned.report.reason


def test_pruning_without_tolerance_never_raises_the_loss_and_keeps_one_adapter(composed):
    composition = composed({"a": 0.7, "b": 0.7, "c": 0.7})
    pruned = composition.prune(0.0)
    assert sum(pruned.losses()) / 5 <= sum(composition.losses()) / 5 + 1e-4
    assert len(composition.prune(100.0).weights) == 1


def test_a_mixture_by_layer_answers_as_the_model_with_each_layers_own_weights(composed, pool, make_model):
    layers = sorted({layer for adapter in pool.adapters.values() for layer in adapter.layers})
    by_layer = {layer: {"a": 0.1 * number, "b": -0.2, "c": 0.0} for number, layer in enumerate(layers)}
    composition = composed({"a": 0.1, "b": -0.2, "c": 0.0}, by_layer)
    dense = dense_by_layer(make_model, pool, by_layer)
    assert sum(composition.losses()) / 5 == pytest.approx(loss_of(composition, dense), rel=1e-4)
    assert composition.weights.experts == ("a", "b")
    assert composition.mean_weights == {"a": 0.1, "b": -0.2}
    merged = composition.adapter
    for layer in layers:
        expected = sum(w * pool[n].delta(layer) for n, w in by_layer[layer].items() if w and layer in pool[n].layers)
        if layer in merged.layers:
            torch.testing.assert_close(merged.delta(layer), expected)


def test_a_mixture_by_layer_is_pruned_and_kept(composed, pool, tmp_path):
    layers = sorted({layer for adapter in pool.adapters.values() for layer in adapter.layers})
    by_layer = {layer: {"a": 1.0 + number, "b": 1e-7, "c": 0.0} for number, layer in enumerate(layers)}
    composition = composed({"a": 2.0, "b": 1e-7, "c": 0.0}, by_layer)
    pruned = composition.prune(1e-4)
    assert len(pruned.mean_weights) == 1
    assert sum(pruned.losses()) <= sum(composition.losses()) + 1e-3
    assert {name for row in pruned.by_layer.values() for name, weight in row.items() if weight} == set(pruned.mean_weights)
    again = lw.Composition.from_pretrained(
        composition.save_pretrained(tmp_path / "kept"), composition.model, composition.tokenizer
    )
    assert again.losses() == pytest.approx(composition.losses(), abs=1e-5)
    assert again.weights.by_layer() == composition.weights.by_layer()


def test_a_cut_to_the_own_rank_loses_nothing_and_a_lower_one_says_its_error(composed, pool):
    composition = composed({"a": 0.6, "b": 0.3, "c": -0.5})
    whole = composition.adapter
    same, lower = composition.cut(whole.rank), composition.cut(2)
    assert same.report["cut"].loss == pytest.approx(sum(composition.losses()) / 5, rel=1e-5)
    assert lower.adapter.rank == 2
    lost = total = 0.0
    for layer in whole.layers:
        singular = torch.linalg.svdvals(whole.delta(layer).double())
        lost += float(singular[2:].square().sum())
        total += float(singular.square().sum())
    assert f"relative error {(lost / total) ** 0.5:.3f}" in lower.report.reason
    assert lower.losses() != pytest.approx(composition.losses(), abs=1e-6)


def test_tuning_begins_at_the_composition_and_lowers_its_loss(composed):
    composition = composed({"a": 0.5, "b": 0.5})
    barely = composition.tune(1, lr=1e-12, progress=False)
    assert barely.losses() == pytest.approx(composition.losses(), abs=1e-4)
    tuned = composition.tune(20, lr=1e-2, progress=False)
    assert sum(tuned.losses()) < 0.9 * sum(composition.losses())
    assert tuned.tuned_steps == 20
    assert tuned.weights == composition.weights
    assert tuned.report.chosen == "tuned"
    assert tuned.report["tuned"].num_trained == sum(
        f.a_RI.numel() + f.b_OR.numel() for f in composition.adapter.layers.values()
    )
    assert tuned.tune(5, progress=False).tuned_steps == 25


def test_a_tuned_composition_is_kept_whole(composed, tmp_path):
    tuned = composed({"a": 0.5}).tune(5, progress=False)
    again = lw.Composition.from_pretrained(tuned.save_pretrained(tmp_path / "kept"), tuned.model, tuned.tokenizer)
    assert again.losses() == pytest.approx(tuned.losses(), abs=1e-6)
    assert (again.tuned_steps, again.weights) == (5, {"a": 0.5})


def test_what_is_tuned_from_the_base_updates_the_layers_of_the_pool(tiny_gpt2, make_adapter, tokenizer):
    pool = lw.ExpertPool(
        [make_adapter(tiny_gpt2, "a", targets=("c_attn",)), make_adapter(tiny_gpt2, "b", targets=("c_fc",))]
    )
    base = lw.compose(tiny_gpt2, tokenizer, pool, lw.Task(EXAMPLES), method="base", progress=False)
    tuned = base.tune(3, progress=False)
    assert {layer.rsplit(".", 1)[-1] for layer in tuned.adapter.layers} == {"c_attn", "c_fc"}
    assert tuned.report["tuned"].loss < base.report["base"].loss


def test_the_base_model_itself_can_be_tuned(composed, tmp_path):
    base = composed({})
    tuned = base.tune(20, lr=1e-2, progress=False)
    assert sum(tuned.losses()) < sum(base.losses())
    assert tuned.weights == {}
    again = lw.Composition.from_pretrained(tuned.save_pretrained(tmp_path / "kept"), tuned.model, tuned.tokenizer)
    assert again.losses() == pytest.approx(tuned.losses(), abs=1e-6)


def test_what_only_the_merged_adapter_is_left_of_cannot_be_pruned(composed, tmp_path):
    composition = composed({"a": 0.5})
    again = lw.Composition.from_pretrained(
        composition.save_pretrained(tmp_path / "kept"), composition.model, composition.tokenizer
    )
    for refused in (again, composition.cut(1), composition.tune(1, progress=False)):
        with pytest.raises(CompositionError, match="only the merged adapter is left"):
            refused.prune()
    with pytest.raises(CompositionError, match="base model itself"):
        composed({}).prune()
    with pytest.raises(CompositionError, match="base model itself"):
        composed({}).cut(2)
    with pytest.raises(WeightingError, match="tolerance is -1"):
        composition.prune(-1)


def test_the_report_of_a_refined_composition_prints_and_is_json(composed):
    report = composed({"a": 0.5, "b": 0.1}).prune(1.0).tune(1, progress=False).report
    assert [row.name for row in report.rows] == ["pruned", "tuned"]
    assert json.loads(json.dumps(report.to_json()))["chosen"] == "tuned"
    assert report.table().row_count == 2


HEAD = {"lm_head.weight": torch.ones(61, 16)}


@pytest.fixture
def pair(tiny_llama, make_adapter, tokenizer):
    tiny_llama.name_or_path = "org/base"
    pool = ExpertPool(
        [replace(make_adapter(tiny_llama, name, seed=seed), base_model="org/base") for seed, name in enumerate("ab")]
    )
    report = Report((), "manual", "", (), 0.0, 0)
    return Composition(tiny_llama, tokenizer, Task([("x", "y")]), pool, {"a": 0.5, "b": -1.0}, "linear", report)


@pytest.mark.own_models
def test_exported_composition_is_the_weighted_sum(pair, tmp_path):
    report = pair.export(tmp_path / "out")
    first, second = pair.pool["a"], pair.pool["b"]
    again = Adapter.from_pretrained(report.folder)
    assert set(again.layers) == set(first.layers)
    for layer in first.layers:
        want = 0.5 * first.delta(layer) - second.delta(layer)
        torch.testing.assert_close(again.delta(layer), want, rtol=1e-5, atol=1e-6)
    assert report.rank == first.rank + second.rank
    assert report.relative_error == 0.0


@pytest.mark.own_models
def test_exported_composition_can_be_cut(pair, tmp_path):
    report = pair.export(tmp_path / "out", max_rank=1)
    assert report.rank == 1
    assert 0 < report.relative_error < 1


@pytest.mark.own_models
def test_composition_that_is_the_base_has_nothing_to_export(pair, tmp_path):
    with pytest.raises(CompositionError, match="the base model itself"):
        replace(pair, all_weights={}).export(tmp_path / "out")


@pytest.mark.own_models
def test_command_exports_a_stored_composition(pair, tmp_path, monkeypatch):
    pair.save_pretrained(tmp_path / "c")
    monkeypatch.setattr(compositions, "load_model", lambda base: (pair.model, pair.tokenizer))
    words = ["export", str(tmp_path / "c"), "--out", str(tmp_path / "p")]
    done = CliRunner().invoke(loraweave.cli.app, words)
    assert done.exit_code == 0, done.stderr
    assert f"for peft to {tmp_path / 'p'}" in " ".join(done.stdout.split())
    assert Adapter.from_pretrained(tmp_path / "p").rank == pair.adapter.rank


@pytest.mark.own_models
def test_head_is_never_left_out_of_a_mixture_without_a_word(pair):
    headed = replace(pair.pool["a"], heads=HEAD)
    for use in (
        lambda: Composer(pair.model, [pair.pool["b"], headed]).bound_pool,
        lambda: ExpertPool([headed]).stacked(next(iter(headed.layers))),
        lambda: replace(pair, pool=ExpertPool([headed, pair.pool["b"]])).adapter,
    ):
        with pytest.raises(AdapterUnsupported, match=r"expert 'a' has a trained head \(lm_head.weight\).*heads=\{\}"):
            use()
    Composer(pair.model, [replace(headed, heads={})]).close()
