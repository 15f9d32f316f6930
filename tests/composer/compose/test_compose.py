"""From examples to a composition: candidates, search, guard, and what comes out, on a tiny model with random adapters."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError

import loraweave as lw
from loraweave import registry
from loraweave.common import state
from loraweave.composer.compose import searched
from loraweave.composer.compose.compose import guard
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.model.batches import batch, encode, mean_losses
from loraweave.errors import CompositionError, InvalidTask, UnknownExpert, WeightingError
from loraweave.hub.base import fingerprint

EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD"), ("e f", "fe")]


@pytest.fixture
def task():
    return lw.Task(EXAMPLES, instruction="swap")


def compose(model, tokenizer, pool, task, **options):
    return lw.compose(
        model, tokenizer, pool, task, **{"method": "lorahub", "budget": 12, "folds": 2, "progress": False, **options}
    )


@torch.no_grad()
def dense_loss(with_dense_update, tokenizer, task, pool, weights, examples=EXAMPLES):
    """Mean over examples of the mean target loss, on a model with the mixture written densely into its weights."""
    model = with_dense_update("llama", list(pool.adapters.values()), [weights.get(name, 0.0) for name in pool.names])
    prompts = [task.prompt(text) for text, _ in examples]
    rows = encode(model, tokenizer, prompts, [target for _, target in examples])
    return float(torch.stack([mean_losses(model, batch(model, tokenizer, [row]))[0] for row in rows]).mean())


def test_the_objective_is_the_mean_loss_plus_the_l1_term_of_every_candidate(
    tiny_llama, tokenizer, pool, task, with_dense_update
):
    engine = lw.Composer(tiny_llama, pool)
    mixtures = [{"a": 0.4, "b": -0.3}, {}, {"c": 1.1}]
    candidates = [lw.MixtureWeights.of(mixture, pool.names) for mixture in mixtures]
    found = ExampleLoss(engine, tokenizer, task)(candidates)
    for loss, mixture in zip(found, mixtures, strict=True):
        penalty = 0.05 * sum(map(abs, mixture.values())) / 3
        expected = dense_loss(with_dense_update, tokenizer, task, pool, mixture) + penalty
        assert loss == pytest.approx(expected, rel=1e-3)


def test_candidates_score_the_same_alone_and_in_a_population(tiny_llama, tokenizer, pool, task, monkeypatch):
    engine = lw.Composer(tiny_llama, pool)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 3, generator=generator) * 0.5
    candidates = [lw.MixtureWeights(row[None, None, None], pool.names) for row in values]
    objective = ExampleLoss(engine, tokenizer, task)
    together = objective(candidates)
    alone = [objective([candidate])[0] for candidate in candidates]
    monkeypatch.setattr("loraweave.composer.compose.population.MAX_LOGITS", 45)
    assert together == pytest.approx(alone, abs=1e-4)
    assert objective(candidates) == pytest.approx(alone, abs=1e-4)


def test_factor_space_losses_are_those_of_factors_mixed_apart(tiny_llama, make_model, make_adapter, tokenizer, task):
    adapters = [make_adapter(tiny_llama, name, seed=seed) for seed, name in enumerate("ab")]
    engine = lw.Composer(tiny_llama, adapters)
    candidate = lw.MixtureWeights.of({"a": 0.7, "b": -0.6}, "ab")
    (found,) = ExampleLoss(engine, tokenizer, task, merge_method="factor_sum", l1=0.0)([candidate])
    model = make_model("llama")
    with torch.no_grad():
        for layer in adapters[0].layers:
            a_RI = sum(w * a.layers[layer].a_RI for w, a in zip((0.7, -0.6), adapters, strict=True))
            b_OR = sum(w * a.layers[layer].b_OR for w, a in zip((0.7, -0.6), adapters, strict=True))
            model.get_submodule(layer).weight += b_OR @ a_RI
        rows = encode(model, tokenizer, [task.prompt(text) for text, _ in EXAMPLES], [target for _, target in EXAMPLES])
        expected = mean_losses(model, batch(model, tokenizer, rows)).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_base_best_single_and_uniform_are_measured_as_defined(tiny_llama, tokenizer, pool, task, with_dense_update):
    report = compose(tiny_llama, tokenizer, pool, task, method="uniform").report
    singles = {name: dense_loss(with_dense_update, tokenizer, task, pool, {name: 1.0}) for name in pool.names}
    uniform = dense_loss(with_dense_update, tokenizer, task, pool, dict.fromkeys(pool.names, 1 / 3))
    assert report["base"].loss == pytest.approx(dense_loss(with_dense_update, tokenizer, task, pool, {}), rel=1e-3)
    assert report["best_single"].loss == pytest.approx(min(singles.values()), rel=1e-3)
    assert report["best_single"].weights == {min(singles, key=singles.get): 1.0}
    assert report["uniform"].loss == pytest.approx(uniform, rel=1e-3)


def test_the_best_single_adapter_is_held_out_too(tiny_llama, tokenizer, pool, task, with_dense_update):
    report = compose(tiny_llama, tokenizer, pool, task, method="auto", folds=5).report
    losses = {
        name: [dense_loss(with_dense_update, tokenizer, task, pool, {name: 1.0}, [pair]) for pair in EXAMPLES]
        for name in pool.names
    }
    held_out = []
    for left in range(5):
        seen = [index for index in range(5) if index != left]
        choice = min(pool.names, key=lambda name: np.mean([losses[name][index] for index in seen]))
        held_out.append(losses[choice][left])
    assert report["best_single"].held_out_loss == pytest.approx(float(np.mean(held_out)), rel=1e-3)


def test_a_search_is_at_least_as_good_on_its_examples_as_the_best_single_adapter(tiny_llama, tokenizer, pool, task):
    report = compose(tiny_llama, tokenizer, pool, task, folds=0, l1=0.0, budget=40).report
    assert report.chosen == "lorahub"
    assert report["lorahub"].loss <= report["best_single"].loss + 1e-5


def test_the_budget_is_counted_exactly(tiny_llama, tokenizer, pool, task):
    report = compose(tiny_llama, tokenizer, pool, task, budget=11, folds=2).report
    # one search on all examples and one for each fold; three single adapters, the base and the uniform mixture
    assert report["lorahub"].evaluations == 3 * 11
    assert report.evaluations == 3 * 11 + 3 + 2


def test_without_a_search_every_candidate_scored_is_one_evaluation(tiny_llama, tokenizer, pool, task, monkeypatch):
    scored = []
    original = ExampleLoss.scores

    def spy(self, candidates):
        scored.extend(candidates)
        return original(self, candidates)

    monkeypatch.setattr(ExampleLoss, "scores", spy)
    report = compose(tiny_llama, tokenizer, pool, task, method="uniform").report
    # three adapters alone, the base, the uniform mixture
    assert len(scored) == report.evaluations == 5


@pytest.mark.parametrize(
    ("method", "base", "single", "search", "chosen"),
    [
        ("lorahub", 2.0, 1.0, 0.5, "lorahub"),
        ("lorahub", 2.0, 1.0, 1.0, "lorahub"),
        ("lorahub", 2.0, 1.0, 1.1, "best_single"),
        ("lorahub", 0.9, 1.0, 1.1, "base"),
        ("auto", 2.0, 1.0, 1.1, "best_single"),
        ("auto", 2.0, 1.0, 0.9, "lorahub"),
        ("auto", 2.0, 1.0, 1.0, "best_single"),
    ],
)
def test_the_guard_gives_way_to_base_or_best_single_when_the_search_is_worse_on_held_out_examples(
    method, base, single, search, chosen
):
    losses = {"base": base, "best_single": single, "uniform": 9.0, "lorahub": search}
    assert guard(method, losses, guarded=True)[0] == chosen


def test_the_guards_reason_names_the_way_that_was_worse():
    losses = {"base": 2.0, "best_single": 1.0, "arrow": 1.5}
    reason = "arrow was worse than best_single on held-out examples: loss 1.500 against 1.000"
    assert guard("arrow", losses, guarded=True) == ("best_single", reason)


@pytest.mark.parametrize(("method", "seed"), list(itertools.product(["lorahub", "auto"], range(4))))
def test_what_is_returned_is_never_worse_on_held_out_examples(method, seed, tiny_llama, tokenizer, pool, task):
    report = compose(tiny_llama, tokenizer, pool, task, method=method, seed=seed).report
    plain = min(report["base"].held_out_loss, report["best_single"].held_out_loss)
    assert report[report.chosen].held_out_loss <= plain


def test_folds_cover_the_examples_once_and_never_meet_their_search(tiny_llama, tokenizer, pool, task, monkeypatch):
    seen_by_searches = []
    original = searched.together

    def spy(objectives, candidates):
        seen_by_searches.extend(frozenset(objective.only) for objective in objectives)
        return original(objectives, candidates)

    monkeypatch.setattr(searched, "together", spy)
    compose(tiny_llama, tokenizer, pool, task, folds=5)
    folds = [set(range(5)) - seen for seen in set(seen_by_searches) if len(seen) < 5]
    assert sorted(index for fold in folds for index in fold) == [0, 1, 2, 3, 4]


def test_the_same_seed_gives_the_same_weights_and_pool_order_does_not_matter_for_fixed_methods(
    tiny_llama, tokenizer, pool, task
):
    first, second = (compose(tiny_llama, tokenizer, pool, task, seed=5) for _ in range(2))
    assert first.weights == second.weights
    turned = lw.ExpertPool(dict(reversed(pool.adapters.items())))
    one = compose(tiny_llama, tokenizer, pool, task, method="best_single")
    other = compose(tiny_llama, tokenizer, turned, task, method="best_single")
    assert one.weights == other.weights


def test_an_interrupted_compose_resumes_to_the_same_weights(tiny_llama, tokenizer, pool, task, tmp_path, monkeypatch):
    whole = compose(tiny_llama, tokenizer, pool, task)
    original, calls = searched.together, itertools.count()

    def killed(objectives, candidates):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(objectives, candidates)

    monkeypatch.setattr(searched, "together", killed)
    with pytest.raises(KeyboardInterrupt):
        compose(tiny_llama, tokenizer, pool, task, checkpoint=tmp_path)
    assert not any(module._forward_hooks for module in tiny_llama.modules())
    resumed = compose(tiny_llama, tokenizer, pool, task, checkpoint=tmp_path)
    assert resumed.weights == whole.weights
    assert resumed.report["lorahub"].held_out_loss == whole.report["lorahub"].held_out_loss


@pytest.mark.parametrize("changed", ["task", "objective", "l2", "adapter", "base", "dtype"])
def test_the_checkpoint_of_another_objective_is_refused(tiny_llama, tokenizer, pool, task, tmp_path, changed):
    random = {"method": "random", "start": "base", "checkpoint": tmp_path}
    compose(tiny_llama, tokenizer, pool, task, **random)
    if changed == "task":
        task = lw.Task([*EXAMPLES[1:], ("a", "aa")], instruction="swap")
    if changed == "adapter":
        first, second, *rest = pool.adapters.values()
        pool = lw.ExpertPool({"a": second, "b": first, "c": rest[0]})
    if changed == "base":
        with torch.no_grad():
            tiny_llama.lm_head.weight.mul_(0.5)
    if changed == "dtype":
        tiny_llama.bfloat16()
    options = {"objective": {"objective": "exact_match"}, "l2": {"l2": 0.1}}.get(changed, {})
    with pytest.raises(WeightingError, match="belongs to a search with other settings"):
        compose(tiny_llama, tokenizer, pool, task, **random, **options)


@pytest.mark.parametrize(
    "options", [{"objective": lambda model, examples: 1.0}, {"objective": "exact_match"}, {"space": "factors"}]
)
def test_a_search_by_gradients_of_an_objective_without_them_is_refused_before_anything_runs(
    tiny_llama, tokenizer, pool, task, options, monkeypatch
):
    monkeypatch.setattr(tiny_llama, "forward", None)
    with pytest.raises(WeightingError, match="there are no gradients of"):
        compose(tiny_llama, tokenizer, pool, task, method="gradient", **options)


@pytest.mark.parametrize("method", ["lorahub", "auto", "best_single", "uniform"])
def test_inputs_without_targets_are_refused_where_nothing_looks_at_them(tiny_llama, tokenizer, pool, task, method):
    with pytest.raises(InvalidTask, match="objective 'entropy'"):
        compose(tiny_llama, tokenizer, pool, task, method=method, inputs=["a"])


def test_an_expert_whose_weights_by_layer_cancel_out_is_still_part_of_the_composition(tiny_llama, tokenizer, pool, task):
    first, second, *_ = lw.Composer(tiny_llama, pool).target_layers
    start = lw.MixtureWeights.of_layers({first: {"c": 0.5, "a": 0.2}, second: {"c": -0.5}}, pool.names)
    groups = {"first": [first], "second": [second]}
    found = compose(tiny_llama, tokenizer, pool, task, method="random", budget=1, folds=0, start=start, groups=groups)
    assert found.mean_weights == pytest.approx({"a": 0.1, "c": 0.0})
    assert found.report["random"].loss == pytest.approx(np.mean(found.losses()), rel=1e-4)
    assert list(found.leave_one_out()) == ["a", "c"]


def test_a_composition_whose_held_out_loss_is_no_number_gives_way_to_the_base(
    tiny_llama, tokenizer, pool, task, make_adapter
):
    huge = make_adapter(tiny_llama, "huge", targets=("lm_head",))
    layers = {name: dataclasses.replace(each, b_OR=each.b_OR.sign() * 3e38) for name, each in huge.layers.items()}
    spoilt = lw.ExpertPool([*pool.adapters.values(), dataclasses.replace(huge, layers=layers)])
    options = {"method": "random", "budget": 1, "start": {"huge": 1.0}, "objective": lambda model, examples: 0.0}
    found = compose(tiny_llama, tokenizer, spoilt, task, **options)
    assert not math.isfinite(found.report["random"].held_out_loss)
    assert found.report.chosen in ("base", "best_single")
    assert json.loads(json.dumps(found.report.to_json(), allow_nan=False))["rows"][3]["held_out_loss"] is None


def test_groups_of_layers_in_the_space_of_factors_are_refused_before_anything_runs(
    tiny_llama, tokenizer, pool, task, monkeypatch
):
    monkeypatch.setattr(tiny_llama, "forward", None)
    groups = {"all": list(lw.Composer(tiny_llama, pool).target_layers)}
    with pytest.raises(WeightingError, match="one weight for each adapter"):
        compose(tiny_llama, tokenizer, pool, task, space="factors", groups=groups)


def test_the_uniform_mixture_is_of_the_space_and_the_groups_asked_for(tiny_llama, tokenizer, make_adapter, task):
    pool = lw.ExpertPool([make_adapter(tiny_llama, name, seed=seed) for seed, name in enumerate("ab")])
    first, *_ = lw.Composer(tiny_llama, pool).target_layers
    factors = compose(tiny_llama, tokenizer, pool, task, method="uniform", space="factors")
    assert factors.merge_method == "factor_sum"
    grouped = compose(tiny_llama, tokenizer, pool, task, method="uniform", groups={"first": [first]})
    assert grouped.by_layer == {first: {"a": 0.5, "b": 0.5}}
    for found in (factors, grouped):
        assert found.report["uniform"].loss == pytest.approx(np.mean(found.losses()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["random", "gradient"])
def test_adapters_with_magnitudes_are_composed_to_what_was_searched_and_saved(
    tiny_llama, tokenizer, make_adapter, task, method, tmp_path
):
    def dora(adapter):
        norms = {name: tiny_llama.get_submodule(name).weight.detach().norm(dim=1) for name in adapter.layers}
        layers = {name: dataclasses.replace(each, magnitude_O=1.1 * norms[name]) for name, each in adapter.layers.items()}
        return dataclasses.replace(adapter, layers=layers)

    pool = lw.ExpertPool([dora(make_adapter(tiny_llama, name, seed=seed)) for seed, name in enumerate("ab")])
    found = compose(tiny_llama, tokenizer, pool, task, method=method, folds=0)
    assert found.report[method].loss == pytest.approx(np.mean(found.losses()), rel=1e-4)
    found.save_pretrained(tmp_path / "kept")
    again = lw.Composition.from_pretrained(tmp_path / "kept", tiny_llama, tokenizer)
    assert again.losses() == pytest.approx(found.losses(), rel=1e-4)
    assert again.cut(2).adapter.rank <= 2
    found.export(tmp_path / "peft")
    model = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "peft").eval()
    ids = torch.tensor([[3, 9, 4]])
    with torch.no_grad(), found._active():
        wanted = tiny_llama(ids).logits
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, wanted, atol=1e-4)


def test_a_composition_answers_without_dropout_whatever_the_mode_of_the_model(make_model, make_adapter, tokenizer, task):
    model = make_model("llama", attention_dropout=0.5)
    found = compose(model, tokenizer, lw.ExpertPool([make_adapter(model, "a")]), task, method="best_single")
    expected = found.losses(), found.predict(["a", "b"]), found.evaluate(EXAMPLES)
    model.train()
    assert (found.losses(), found.predict(["a", "b"]), found.evaluate(EXAMPLES)) == expected
    assert model.training


def test_manual_weights_are_taken_as_given(tiny_llama, tokenizer, pool, task):
    composition = compose(tiny_llama, tokenizer, pool, task, method="manual", weights={"c": -0.25, "a": 1.5})
    assert composition.weights == {"c": -0.25, "a": 1.5}


def test_a_composition_is_saved_and_read_back_to_the_same_answers(tiny_llama, tokenizer, pool, task, tmp_path, make_model):
    composition = compose(tiny_llama, tokenizer, pool, task, method="manual", weights={"a": 0.5, "b": 0.5})
    composition.save_pretrained(tmp_path / "kept")
    again = lw.Composition.from_pretrained(tmp_path / "kept", make_model("llama"), tokenizer)
    assert again.weights == composition.weights
    assert again.adapter.hash == composition.adapter.hash
    assert again.report == composition.report
    inputs = [text for text, _ in EXAMPLES]
    assert again.predict(inputs) == composition.predict(inputs)
    assert again.task.examples == composition.task.examples


def test_a_composition_that_is_the_base_has_no_adapter_and_answers_as_the_base(tiny_llama, tokenizer, pool, task, tmp_path):
    from loraweave.composer.model import scoring

    composition = compose(tiny_llama, tokenizer, pool, task, method="base")
    with pytest.raises(CompositionError, match="base model itself"):
        _ = composition.adapter
    inputs = [text for text, _ in EXAMPLES]
    assert composition.predict(inputs) == scoring.predict(tiny_llama, tokenizer, task, inputs)
    composition.save_pretrained(tmp_path / "kept")
    assert lw.Composition.from_pretrained(tmp_path / "kept", tiny_llama, tokenizer).weights == {}


def test_answers_are_those_of_a_model_with_the_mixture_in_its_weights(tiny_llama, tokenizer, pool, task, with_dense_update):
    from loraweave.composer.model import scoring

    composition = compose(tiny_llama, tokenizer, pool, task, method="manual", weights={"a": 0.8, "c": -0.3})
    dense = with_dense_update("llama", [pool["a"], pool["c"]], [0.8, -0.3])
    inputs = [text for text, _ in EXAMPLES]
    assert composition.predict(inputs) == scoring.predict(dense, tokenizer, task, inputs)
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_labels_are_predicted_where_the_task_has_them(tiny_llama, tokenizer, pool):
    labelled = lw.Task([("a", "yes"), ("b", "no"), ("c", "yes")], labels=["yes", "no"])
    composition = compose(tiny_llama, tokenizer, pool, labelled, method="uniform")
    assert set(composition.predict(["x", "y", "z"])) <= {"yes", "no"}
    scores = composition.evaluate([("x", "yes"), ("y", "no")])
    assert scores["low"] <= scores["value"] <= scores["high"]
    assert scores["count"] == 2


def test_a_composition_of_another_base_is_refused(tiny_llama, make_model, tokenizer, pool, task, tmp_path):
    compose(tiny_llama, tokenizer, pool, task, method="uniform").save_pretrained(tmp_path / "kept")
    with pytest.raises(lw.BaseModelMismatch, match="composed for"):
        lw.Composition.from_pretrained(tmp_path / "kept", make_model("llama", vocab_size=67), tokenizer)


def test_a_damaged_composition_is_refused_by_name(tiny_llama, tokenizer, pool, task, tmp_path):
    compose(tiny_llama, tokenizer, pool, task, method="uniform").save_pretrained(tmp_path / "kept")
    path = tmp_path / "kept" / "composition.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(lw.AdapterCorrupt, match="damaged"):
        lw.Composition.from_pretrained(tmp_path / "kept", tiny_llama, tokenizer)


def test_a_composition_that_finds_no_room_is_named_and_leaves_the_one_before(
    tiny_llama, tokenizer, pool, task, tmp_path, monkeypatch
):
    composition = compose(tiny_llama, tokenizer, pool, task, method="uniform")
    composition.save_pretrained(tmp_path / "kept")
    before = (tmp_path / "kept" / "composition.json").read_text()

    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(state, "save_file", full)
        with pytest.raises(lw.HubFull, match="free some space"):
            composition.save_pretrained(tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "composition.json").read_text() == before


def test_a_folder_with_something_else_is_never_overwritten(tiny_llama, tokenizer, pool, task, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(CompositionError, match="no composition"):
        compose(tiny_llama, tokenizer, pool, task, method="uniform").save_pretrained(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "manual", "weights": {"nobody": 1.0}}, UnknownExpert, "'nobody'"),
        ({"method": "manual", "weights": {"a": math.nan}}, WeightingError, "'a' .*nan"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_and_the_model_stays(
    options, error, message, tiny_llama, tokenizer, pool, task
):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    with pytest.raises(error, match=message):
        compose(tiny_llama, tokenizer, pool, task, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_llama.state_dict().items())


@pytest.mark.parametrize("examples", [[], [("a", "b")]])
def test_too_few_examples_to_hold_out_are_refused(examples, tiny_llama, tokenizer, pool):
    with pytest.raises(InvalidTask, match="example"):
        compose(tiny_llama, tokenizer, pool, lw.Task(examples))


def test_an_empty_hub_gives_the_base_model_where_it_is_asked_for_and_says_why(tiny_llama, tokenizer, task, tmp_path):
    with lw.Hub(tmp_path / "hub") as hub:
        composition = compose(tiny_llama, tokenizer, hub, task, method="base")
    assert composition.weights == {}
    assert "has no adapters to compose" in composition.report.reason


class LetterEmbedder:
    """The share of two letters, so that a search is known without a model."""

    dim = 2
    id = "letters"

    def embed(self, texts):
        counts = np.array([[text.count("a") + 1.0, text.count("b") + 1.0] for text in texts])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


def test_candidates_are_for_the_weights_of_the_base_and_not_for_its_name(
    tiny_llama, tokenizer, pool, task, tmp_path, monkeypatch
):
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda folder, name: LetterEmbedder if folder == "embedders" else get(folder, name))
    own = fingerprint(tiny_llama)
    other = dataclasses.replace(own, samples=tuple(value + 1 for value in own.samples))
    right, namesake, _ = pool.adapters.values()
    with lw.Hub(tmp_path / "hub") as hub:
        hub.add(dataclasses.replace(right, name="right", base_model="the same, in a folder", fingerprint=own))
        hub.add(dataclasses.replace(namesake, name="namesake", base_model=tiny_llama.name_or_path, fingerprint=other))
        with pytest.warns(UserWarning, match=r"1 adapters are left out, 'namesake' the first.*sampled weights differ"):
            composition = compose(tiny_llama, tokenizer, hub, task, method="uniform")
    assert composition.weights == {"right": 1.0}


def test_the_report_prints_as_a_table_and_is_json(tiny_llama, tokenizer, pool, task):
    import json

    report = compose(tiny_llama, tokenizer, pool, task).report
    assert json.loads(json.dumps(report.to_json()))["chosen"] == report.chosen
    assert report.table().row_count == 4


def test_the_curve_of_a_search_is_in_its_report_and_is_drawn(tiny_llama, tokenizer, pool, task, tmp_path):
    pytest.importorskip("matplotlib")
    composition = compose(tiny_llama, tokenizer, pool, task, folds=0)
    row = composition.report["lorahub"]
    assert len(row.losses) == row.evaluations == 12
    assert min(row.losses) == pytest.approx(row.loss + 0.05 * sum(map(abs, row.weights.values())) / 3, abs=1e-3)
    assert composition.report.plot(tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    again = lw.Composition.from_pretrained(composition.save_pretrained(tmp_path / "kept"), tiny_llama, tokenizer)
    assert again.report == composition.report
    with pytest.raises(CompositionError, match="nothing was searched"):
        compose(tiny_llama, tokenizer, pool, task, method="uniform").report.plot(tmp_path / "none.png")


def test_a_search_begins_where_retrieval_points(tiny_llama, tokenizer, pool, task, tmp_path, monkeypatch):
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda folder, name: LetterEmbedder if folder == "embedders" else get(folder, name))
    with lw.Hub(tmp_path / "hub") as hub:
        for (name, adapter), example in zip(pool.adapters.items(), ("aaa", "bbb", "ab"), strict=True):
            hub.add(dataclasses.replace(adapter, name=name, base_model=tiny_llama.name_or_path), examples=[example])
        composition = compose(tiny_llama, tokenizer, hub, task, method="random", start="retrieval", folds=0, budget=1)
    scores = dict(composition.report.candidates)
    powers = {name: math.exp(score / 0.1) for name, score in scores.items()}
    expected = {name: power / sum(powers.values()) for name, power in powers.items()}
    assert composition.report["random"].weights == pytest.approx(expected, rel=1e-4)
    with pytest.raises(WeightingError, match="needs a hub"):
        compose(tiny_llama, tokenizer, pool, task, start="retrieval")
