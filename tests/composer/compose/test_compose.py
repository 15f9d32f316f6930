"""From examples to a composition: candidates, search, guard, and what comes out, on a tiny model with random adapters."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError

import loraweave as lw
from loraweave import registry
from loraweave.common import descent
from loraweave.composer.compose import learning
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.compose.report import MAX_FILE_BYTES
from loraweave.composer.compose.ways import guard
from loraweave.composer.model import scoring
from loraweave.errors import CompositionError, InvalidTask, UnknownExpert, WeightingError
from loraweave.hub.base import fingerprint


@pytest.fixture
def compose(compose_on):
    return partial(compose_on, method="lorahub", budget=12, folds=2)


@pytest.fixture
def dense_loss(with_dense_update, losses_alone, task, pool):
    """The mean over examples of the mean target loss, on a model with the mixture written densely into its weights."""

    def loss(weights, examples=task.examples):
        adapters = list(pool.adapters.values())
        return float(
            np.mean(losses_alone(with_dense_update("llama", adapters, [weights.get(n, 0.0) for n in pool.names]), examples))
        )

    return loss


def test_base_best_single_and_uniform_are_measured_as_defined(dense_loss, compose, pool):
    report = compose(method="uniform").report
    singles = {name: dense_loss({name: 1.0}) for name in pool.names}
    uniform = dense_loss(dict.fromkeys(pool.names, 1 / 3))
    assert report["base"].loss == pytest.approx(dense_loss({}), rel=1e-3)
    assert report["best_single"].loss == pytest.approx(min(singles.values()), rel=1e-3)
    assert report["best_single"].weights == {min(singles, key=singles.get): 1.0}
    assert report["uniform"].loss == pytest.approx(uniform, rel=1e-3)


def test_the_best_single_adapter_is_held_out_too(dense_loss, compose, pool, task):
    report = compose(method="auto", budget=16, folds=5).report
    losses = {name: [dense_loss({name: 1.0}, [pair]) for pair in task.examples] for name in pool.names}
    held_out = []
    for left in range(5):
        seen = [index for index in range(5) if index != left]
        choice = min(pool.names, key=lambda name: np.mean([losses[name][index] for index in seen]))
        held_out.append(losses[choice][left])
    assert report["best_single"].held_out_loss == pytest.approx(float(np.mean(held_out)), rel=1e-3)


def test_a_search_is_at_least_as_good_on_its_examples_as_the_best_single_adapter(compose):
    report = compose(folds=0, l1=0.0, budget=40).report
    assert report.chosen == "lorahub"
    assert report["lorahub"].loss <= report["best_single"].loss + 1e-5


def test_the_budget_is_counted_exactly(compose):
    report = compose(budget=11, folds=2).report
    # one search on all examples and one for each fold; three single adapters, the base and the uniform mixture
    assert report["lorahub"].evaluations == 3 * 11
    assert report.evaluations == 3 * 11 + 3 + 2


def test_without_a_search_every_candidate_scored_is_one_evaluation(compose, monkeypatch):
    scored = []
    original = ExampleLoss.scores

    def spy(self, candidates):
        scored.extend(candidates)
        return original(self, candidates)

    monkeypatch.setattr(ExampleLoss, "scores", spy)
    report = compose(method="uniform").report
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
    assert guard("lorahub", losses, guarded=True, best_of_all=method == "auto")[0] == chosen


def test_the_guards_reason_names_the_way_that_was_worse():
    losses = {"base": 2.0, "best_single": 1.0, "arrow": 1.5}
    reason = "arrow was worse than best_single on held-out examples: loss 1.500 against 1.000"
    assert guard("arrow", losses, guarded=True) == ("best_single", reason)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_returned_is_never_worse_on_held_out_examples(compose, seed):
    report = compose(seed=seed).report
    plain = min(report["base"].held_out_loss, report["best_single"].held_out_loss)
    assert report[report.chosen].held_out_loss <= plain


def test_folds_cover_the_examples_once_and_never_meet_their_search(compose, monkeypatch):
    seen_by_searches = []
    original = learning.together

    def spy(objectives, candidates):
        seen_by_searches.extend(frozenset(objective.only) for objective in objectives)
        return original(objectives, candidates)

    monkeypatch.setattr(learning, "together", spy)
    compose(folds=5)
    folds = [set(range(5)) - seen for seen in set(seen_by_searches) if len(seen) < 5]
    assert sorted(index for fold in folds for index in fold) == [0, 1, 2, 3, 4]


def test_the_same_seed_gives_the_same_weights_and_pool_order_does_not_matter_for_fixed_methods(compose, pool):
    first, second = (compose(seed=5) for _ in range(2))
    assert first.weights == second.weights
    turned = lw.ExpertPool(dict(reversed(pool.adapters.items())))
    one = compose(method="best_single")
    other = compose(turned, method="best_single")
    assert one.weights == other.weights


def test_an_interrupted_compose_resumes_to_the_same_weights(compose, interrupt_search, tiny_llama, tmp_path):
    whole = compose()
    interrupt_search()
    with pytest.raises(KeyboardInterrupt):
        compose(checkpoint=tmp_path)
    assert not any(module._forward_hooks for module in tiny_llama.modules())
    resumed = compose(checkpoint=tmp_path)
    assert resumed.weights == whole.weights
    assert resumed.report["lorahub"].held_out_loss == whole.report["lorahub"].held_out_loss


@pytest.mark.parametrize("changed", ["task", "objective", "l2", "adapter", "base", "dtype"])
@pytest.mark.own_models
def test_the_checkpoint_of_another_objective_is_refused(compose, tiny_llama, pool, task, tmp_path, changed):
    random = {"method": "random", "start": "base", "checkpoint": tmp_path}
    compose(**random)
    first, second, third = pool.adapters.values()
    options = {
        "task": {"task": lw.Task([*task.examples[1:], ("a", "aa")], instruction="swap")},
        "objective": {"objective": "exact_match"},
        "l2": {"l2": 0.1},
        "adapter": {"given": {"a": second, "b": first, "c": third}},
    }.get(changed, {})
    if changed == "base":
        with torch.no_grad():
            tiny_llama.lm_head.weight.mul_(0.5)
    if changed == "dtype":
        tiny_llama.bfloat16()
    with pytest.raises(WeightingError, match="belongs to a search with other settings"):
        compose(**random, **options)


@pytest.mark.parametrize(
    "options", [{"objective": lambda model, examples: 1.0}, {"objective": "exact_match"}, {"space": "factors"}]
)
def test_a_search_by_gradients_of_an_objective_without_them_is_refused_before_anything_runs(
    compose, tiny_llama, options, monkeypatch
):
    monkeypatch.setattr(tiny_llama, "forward", None)
    with pytest.raises(WeightingError, match="there are no gradients of"):
        compose(method="gradient", **options)


@pytest.mark.parametrize("method", ["lorahub", "auto", "best_single", "uniform"])
def test_inputs_without_targets_are_refused_where_nothing_looks_at_them(compose, method):
    with pytest.raises(InvalidTask, match="objective 'entropy'"):
        compose(method=method, inputs=["a"])


def test_an_expert_whose_weights_by_layer_cancel_out_is_still_part_of_the_composition(compose, tiny_llama, pool):
    first, second, *_ = lw.Composer(tiny_llama, pool).target_layers
    start = lw.MixtureWeights.of_layers({first: {"c": 0.5, "a": 0.2}, second: {"c": -0.5}}, pool.names)
    groups = {"first": [first], "second": [second]}
    found = compose(method="random", budget=1, folds=0, start=start, groups=groups)
    assert found.mean_weights == pytest.approx({"a": 0.1, "c": 0.0})
    assert found.report["random"].loss == pytest.approx(np.mean(found.losses()), rel=1e-4)
    assert list(found.leave_one_out()) == ["a", "c"]


def test_a_composition_whose_held_out_loss_is_no_number_gives_way_to_the_base(compose, tiny_llama, pool, make_adapter):
    huge = make_adapter(tiny_llama, "huge", targets=("lm_head",))
    layers = {name: dataclasses.replace(each, b_OR=each.b_OR.sign() * 3e38) for name, each in huge.layers.items()}
    spoilt = lw.ExpertPool([*pool.adapters.values(), dataclasses.replace(huge, layers=layers)])
    options = {"method": "random", "budget": 1, "start": {"huge": 1.0}, "objective": lambda model, examples: 0.0}
    found = compose(spoilt, **options)
    assert not math.isfinite(found.report["random"].held_out_loss)
    assert found.report.chosen in ("base", "best_single")
    assert json.loads(json.dumps(found.report.to_json(), allow_nan=False))["rows"][3]["held_out_loss"] is None


def test_groups_of_layers_in_the_space_of_factors_are_refused_before_anything_runs(compose, tiny_llama, pool, monkeypatch):
    monkeypatch.setattr(tiny_llama, "forward", None)
    groups = {"all": list(lw.Composer(tiny_llama, pool).target_layers)}
    with pytest.raises(WeightingError, match="one weight for each adapter"):
        compose(space="factors", groups=groups)


def test_the_uniform_mixture_is_of_the_space_and_the_groups_asked_for(compose, tiny_llama, make_adapter):
    pool = lw.ExpertPool([make_adapter(tiny_llama, name, seed=seed) for seed, name in enumerate("ab")])
    first, *_ = lw.Composer(tiny_llama, pool).target_layers
    factors = compose(pool, method="uniform", space="factors")
    assert factors.merge_method == "factor_sum"
    grouped = compose(pool, method="uniform", groups={"first": [first]})
    assert grouped.by_layer == {first: {"a": 0.5, "b": 0.5}}
    for found in (factors, grouped):
        assert found.report["uniform"].loss == pytest.approx(np.mean(found.losses()), rel=1e-4)


def test_the_weights_of_a_search_are_those_of_the_merge_method_asked_for(compose, tiny_llama, tokenizer, pool, task):
    found = compose(method="random", budget=2, folds=0, merge_method="ties_weighted")
    names = list(found.mean_weights)
    merged = lw.merge([pool[name] for name in names], list(found.mean_weights.values()), method="ties_weighted")
    with lw.Composer(tiny_llama, [merged]).activate({merged.name: 1.0}):
        losses = scoring.losses(tiny_llama, tokenizer, task, task.examples)
    assert found.merge_method == "ties_weighted"
    assert found.report["random"].loss == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["random", "gradient"])
def test_adapters_with_magnitudes_are_composed_to_what_was_searched_and_saved(
    compose, dora_pool, tiny_llama, tokenizer, method, tmp_path
):
    found = compose(dora_pool, method=method, folds=0)
    assert found.report[method].loss == pytest.approx(np.mean(found.losses()), rel=1e-4)
    found.save_pretrained(tmp_path / "kept")
    again = lw.Composition.from_pretrained(tmp_path / "kept", tiny_llama, tokenizer)
    assert again.losses() == pytest.approx(found.losses(), rel=1e-4)
    assert again.cut(2).adapter.rank <= 2
    found.export(tmp_path / "peft")
    model = PeftModel.from_pretrained(copy.deepcopy(tiny_llama), tmp_path / "peft").eval()
    ids = torch.tensor([[3, 9, 4]])
    with torch.no_grad(), found.activate():
        wanted = tiny_llama(ids).logits
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, wanted, atol=1e-4)


def test_a_composition_answers_without_dropout_whatever_the_mode_of_the_model(compose, make_model, make_adapter, task):
    model = make_model("llama", attention_dropout=0.5)
    found = compose([make_adapter(model, "a")], model=model, method="best_single")
    expected = found.losses(), found.predict(["a", "b"]), found.evaluate(task.examples)
    model.train()
    assert (found.losses(), found.predict(["a", "b"]), found.evaluate(task.examples)) == expected
    assert model.training


@pytest.mark.parametrize("shown", [(), True])
def test_a_composition_is_saved_and_read_back_to_the_same_answers(shown, compose, tokenizer, task, tmp_path, make_model):
    task = dataclasses.replace(task, demonstrations=shown)
    composition = compose(task=task, method="manual", weights={"c": -0.25, "a": 1.5})
    assert composition.weights == {"c": -0.25, "a": 1.5}
    composition.save_pretrained(tmp_path / "kept")
    again = lw.Composition.from_pretrained(tmp_path / "kept", make_model("llama"), tokenizer)
    assert again.weights == composition.weights
    assert again.adapter.hash == composition.adapter.hash
    assert again.report == composition.report
    inputs = [text for text, _ in task.examples]
    assert again.predict(inputs) == composition.predict(inputs)
    assert again.task == composition.task


def test_a_composition_that_is_the_base_has_no_adapter_and_answers_as_the_base(
    compose, tiny_llama, tokenizer, task, tmp_path
):
    from loraweave.composer.model import scoring

    composition = compose(method="base")
    with pytest.raises(CompositionError, match="base model itself"):
        _ = composition.adapter
    inputs = [text for text, _ in task.examples]
    assert composition.predict(inputs) == scoring.predict(tiny_llama, tokenizer, task, inputs)
    composition.save_pretrained(tmp_path / "kept")
    assert lw.Composition.from_pretrained(tmp_path / "kept", tiny_llama, tokenizer).weights == {}


def test_answers_are_those_of_a_model_with_the_mixture_in_its_weights(
    compose, tiny_llama, tokenizer, pool, task, with_dense_update
):
    from loraweave.composer.model import scoring

    composition = compose(method="manual", weights={"a": 0.8, "c": -0.3})
    dense = with_dense_update("llama", [pool["a"], pool["c"]], [0.8, -0.3])
    inputs = [text for text, _ in task.examples]
    assert composition.predict(inputs) == scoring.predict(dense, tokenizer, task, inputs)
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_labels_are_predicted_where_the_task_has_them(compose):
    labelled = lw.Task([("a", "yes"), ("b", "no"), ("c", "yes")], labels=["yes", "no"])
    composition = compose(task=labelled, method="uniform")
    assert set(composition.predict(["x", "y", "z"])) <= {"yes", "no"}
    scores = composition.evaluate([("x", "yes"), ("y", "no")])
    assert scores["low"] <= scores["value"] <= scores["high"]
    assert scores["count"] == 2


def test_a_composition_of_another_base_a_newer_one_and_a_damaged_one_are_refused(
    compose, tiny_llama, make_model, tokenizer, tmp_path
):
    path = compose(method="uniform").save_pretrained(tmp_path / "kept") / "composition.json"
    with pytest.raises(lw.BaseModelMismatch, match="composed for"):
        lw.Composition.from_pretrained(path.parent, make_model("llama", vocab_size=67), tokenizer)
    text = path.read_text()
    for damage, error, message in (
        (json.dumps({**json.loads(text), "format": 7}), CompositionError, "format 7"),
        (json.dumps({**json.loads(text), "format": 5, "steps": None}), lw.AdapterCorrupt, "damaged"),
        (json.dumps({**json.loads(text), "share": 0}), lw.AdapterCorrupt, "share 0, not a number above 0"),
        (text[:100], lw.AdapterCorrupt, "damaged"),
        (text + " " * MAX_FILE_BYTES, lw.AdapterCorrupt, "more than the limit"),
    ):
        path.write_text(damage)
        with pytest.raises(error, match=message):
            lw.Composition.from_pretrained(path.parent, tiny_llama, tokenizer)


def test_a_composition_that_finds_no_room_is_named_and_leaves_the_one_before(compose, tmp_path, monkeypatch):
    composition = compose(method="uniform")
    composition.save_pretrained(tmp_path / "kept")
    before = (tmp_path / "kept" / "composition.json").read_text()

    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(descent, "save_file", full)
        with pytest.raises(lw.HubFull, match="free some space"):
            composition.save_pretrained(tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "composition.json").read_text() == before


def test_a_folder_with_something_else_is_never_overwritten(compose, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(CompositionError, match="not a composition"):
        compose(method="uniform").save_pretrained(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "manual", "weights": {"nobody": 1.0}}, UnknownExpert, "'nobody'"),
        ({"method": "manual", "weights": {"a": math.nan}}, WeightingError, "'a' .*nan"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_and_the_model_stays(compose, options, error, message, tiny_llama):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    with pytest.raises(error, match=message):
        compose(**options)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_llama.state_dict().items())


@pytest.mark.parametrize("examples", [[], [("a", "b")]])
def test_too_few_examples_to_hold_out_are_refused(compose, examples):
    with pytest.raises(InvalidTask, match="example"):
        compose(task=lw.Task(examples))


def test_an_empty_hub_gives_the_base_model_where_it_is_asked_for_and_says_why(compose, tmp_path):
    with lw.Hub(tmp_path / "hub") as hub:
        composition = compose(hub, method="base")
    assert composition.weights == {}
    assert "has no adapters to compose" in composition.report.reason


class LetterEmbedder:
    """The share of two letters, so that a search is known without a model."""

    dim = 2
    id = "letters"

    def embed(self, texts):
        counts = np.array([[text.count("a") + 1.0, text.count("b") + 1.0] for text in texts])
        return (counts / np.linalg.norm(counts, axis=1, keepdims=True)).astype(np.float32)


def test_candidates_are_for_the_weights_of_the_base_and_not_for_its_name(compose, tiny_llama, pool, tmp_path, monkeypatch):
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda folder, name: LetterEmbedder if folder == "embedders" else get(folder, name))
    own = fingerprint(tiny_llama)
    other = dataclasses.replace(own, samples=tuple(value + 1 for value in own.samples))
    right, namesake, _ = pool.adapters.values()
    with lw.Hub(tmp_path / "hub") as hub:
        hub.add(dataclasses.replace(right, name="right", base_model="the same, in a folder", fingerprint=own))
        hub.add(dataclasses.replace(namesake, name="namesake", base_model=tiny_llama.name_or_path, fingerprint=other))
        with pytest.warns(UserWarning, match=r"1 adapters are left out, 'namesake' the first.*sampled weights differ"):
            composition = compose(hub, method="uniform")
    assert composition.weights == {"right": 1.0}


def test_the_curve_of_a_search_is_in_its_report(compose, tiny_llama, tokenizer, tmp_path):
    composition = compose(folds=0)
    assert json.loads(json.dumps(composition.report.to_json()))["chosen"] == "lorahub"
    assert composition.report.table().row_count == 4
    row = composition.report["lorahub"]
    assert len(row.losses) == row.evaluations == 12
    assert min(row.losses) == pytest.approx(row.loss + 0.05 * sum(map(abs, row.weights.values())) / 3, abs=1e-3)
    again = lw.Composition.from_pretrained(composition.save_pretrained(tmp_path / "kept"), tiny_llama, tokenizer)
    assert again.report == composition.report
    assert compose(method="uniform").report["uniform"].losses == ()


def test_a_search_begins_where_retrieval_points(compose, tiny_llama, pool, tmp_path, monkeypatch):
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda folder, name: LetterEmbedder if folder == "embedders" else get(folder, name))
    with lw.Hub(tmp_path / "hub") as hub:
        for (name, adapter), example in zip(pool.adapters.items(), ("aaa", "bbb", "ab"), strict=True):
            hub.add(dataclasses.replace(adapter, name=name, base_model=tiny_llama.name_or_path), examples=[example])
        composition = compose(hub, method="random", start="retrieval", folds=0, budget=1)
    scores = dict(composition.report.candidates)
    powers = {name: math.exp(score / 0.1) for name, score in scores.items()}
    expected = {name: power / sum(powers.values()) for name, power in powers.items()}
    assert composition.report["random"].weights == pytest.approx(expected, rel=1e-4)
    with pytest.raises(WeightingError, match="needs a hub"):
        compose(start="retrieval")
