"""What method="auto" learns and averages, and what it returns where some of it is left out."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from rich.progress import Progress

import loraweave as lw
from loraweave.composer.compose import learning, ways
from loraweave.composer.compose.learning import FEW_SHOT, ORDERS
from loraweave.errors import InvalidTask, ScopeError, UnknownName, WeightingError

EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD")]
PLAIN = ["base", "best_single", "uniform", "in_context"]


@pytest.fixture
def task():
    return lw.Task(EXAMPLES, instruction="swap")


@pytest.fixture
def compose(compose_on):
    return partial(compose_on, method="auto")


def rows_of(report):
    return [row.name for row in report.rows]


def test_composing_averages_where_nothing_else_is_asked_for(compose_on):
    found = compose_on()
    assert rows_of(found.report) == [*PLAIN, "gradient", "few_shot", "average"]
    assert found.report.chosen == "average"
    assert list(found.members) == ["gradient", "few_shot"]
    # of what was learned on all examples nothing is known elsewhere
    assert [found.report[name].held_out_loss for name in ("gradient", "few_shot", "average")] == [None] * 3
    assert found.report["base"].held_out_loss is not None


def test_the_members_are_what_their_methods_compose_alone(compose_on, task):
    found = compose_on(seed=3)
    gradient = compose_on(method="gradient", budget=ways.EACH, folds=0, seed=3)
    few_shot = compose_on(method="few_shot", folds=0, seed=3)
    for name, alone in {"gradient": gradient, "few_shot": few_shot}.items():
        assert found.members[name].losses() == pytest.approx(alone.losses(), rel=1e-5)
        assert found.members[name].report.chosen == name
    assert found.members["gradient"].task == task
    assert found.members["few_shot"].task == lw.Task(EXAMPLES, instruction="swap", demonstrations=True, orders=ORDERS)
    assert found.losses() == pytest.approx(
        [(a + 3 * b) / 4 for a, b in zip(gradient.losses(), few_shot.losses(), strict=True)], rel=1e-5
    )


@pytest.mark.parametrize("given", [None, ["x y", "g", "h h"]])
def test_its_answers_have_the_highest_average_probability(given, compose_on, tiny_llama, tokenizer):
    labels = ["ab", "ba", "c", "DD"]
    found = compose_on(task=lw.Task(EXAMPLES, instruction="swap", labels=labels), inputs=given)
    # inputs without answers tell the prior of every label, an example that of the labels that it does not have
    others = [(text, None) for text in given] if given else EXAMPLES
    inputs = ["e", "f g", "hh", "b"]
    p_NL = torch.zeros(len(inputs), len(labels), dtype=torch.float64)
    for member in found.members.values():
        orders = member.task.in_orders()
        with lw.Composer(tiny_llama, [member.adapter]).activate({member.adapter.name: 1.0}), torch.no_grad():
            for task in orders:
                end = task.answer_end or tokenizer.eos_token
                p_CL = [p_of(tiny_llama, tokenizer, task.prompt(text), labels, end) for text, _ in others]
                prior_L = torch.stack([geometric_mean_of_others(p_CL, others, place) for place in range(len(labels))])
                for number, text in enumerate(inputs):
                    ratio_L = p_of(tiny_llama, tokenizer, task.prompt(text), labels, end) / prior_L
                    p_NL[number] += member.share * ratio_L / ratio_L.sum() / len(orders)
    assert found.predict(inputs) == [labels[int(best)] for best in p_NL.argmax(dim=1)]
    expected = [labels[int(best)] == "ab" for best in p_NL.argmax(dim=1)]
    assert found.evaluate([(text, "ab") for text in inputs])["value"] == pytest.approx(sum(expected) / 4)


def geometric_mean_of_others(p_CL, others, place):
    """Of the probability of the label at this place of ab, ba, c, DD, after the inputs that have another answer."""
    counted = [p_L[place] for p_L, (_, answer) in zip(p_CL, others, strict=True) if answer != ("ab", "ba", "c", "DD")[place]]
    return torch.stack(counted).prod() ** (1 / len(counted))


def p_of(model, tokenizer, prompt, labels, end):
    """p_L of the labels after a prompt, by their summed log-likelihoods."""
    ids, scores = tokenizer(prompt)["input_ids"], []
    for label in labels:
        target = tokenizer(f" {label}{end}", add_special_tokens=False)["input_ids"]
        log_p_TV = model(torch.tensor([ids + target])).logits[0].double().log_softmax(dim=-1)
        scores.append(sum(log_p_TV[len(ids) - 1 + place, token] for place, token in enumerate(target)))
    return torch.stack(scores).softmax(dim=0)


def test_an_average_is_kept_whole(compose, tiny_llama, tokenizer, tmp_path):
    found = compose()
    found.save_pretrained(tmp_path / "kept")
    read = lw.Composition.from_pretrained(tmp_path / "kept", tiny_llama, tokenizer)
    assert {name: member.share for name, member in read.members.items()} == {"gradient": 1.0, "few_shot": 3.0}
    assert read.losses() == pytest.approx(found.losses(), rel=1e-4)
    assert read.predict(["b", "x"]) == found.predict(["b", "x"])
    assert read.report == found.report
    assert read.mean_weights == pytest.approx(found.mean_weights)


def test_an_average_that_was_saved_without_shares_has_equal_ones(compose, tiny_llama, tokenizer, tmp_path):
    found = compose()
    found.save_pretrained(tmp_path)
    for path in tmp_path.rglob("composition.json"):
        recipe = json.loads(path.read_text())
        del recipe["share"]
        path.write_text(json.dumps({**recipe, "format": 4 if path.parent == tmp_path else recipe["format"]}))
    read = lw.Composition.from_pretrained(tmp_path, tiny_llama, tokenizer)
    each = [member.losses() for member in found.members.values()]
    assert read.losses() == pytest.approx([(a + b) / 2 for a, b in zip(*each, strict=True)], rel=1e-4)


def test_of_many_examples_a_fifth_chooses_among_the_ways_and_the_best_learns_from_all(compose_on, tmp_path):
    many = lw.Task([(f"{first} {second}", first) for first in "abcde" for second in "fghijklmno"], instruction="first")
    found = compose_on(task=many, checkpoint=tmp_path)
    assert rows_of(found.report) == [*PLAIN, "gradient", "few_shot", "lora"]
    best = min(found.report.rows, key=lambda row: row.held_out_loss)
    assert found.report.chosen == best.name == "lora"
    # the others were trained for the comparison alone
    assert [found.report[name].loss for name in ("gradient", "few_shot")] == [None] * 2
    assert sum(found.losses()) / 50 == pytest.approx(best.loss, rel=1e-4)
    assert found.task == many
    assert not found.members
    assert "lora" not in rows_of(compose_on(task=lw.Task(many.examples[:49], instruction="first")).report)
    assert "lora" not in rows_of(compose_on(task=many, budget=20).report)


def test_the_inputs_that_calibrate_are_kept(compose_on, tiny_llama, tokenizer, tmp_path):
    inputs = [f"x {number}" for number in range(25)]
    found = compose_on(task=lw.Task(EXAMPLES, labels=["ab", "ba", "c", "DD"]), inputs=inputs)
    found.save_pretrained(tmp_path / "kept")
    read = lw.Composition.from_pretrained(tmp_path / "kept", tiny_llama, tokenizer)
    assert [member.task.calibrated for member in read.members.values()] == [tuple(inputs[:20])] * 2
    found = compose_on(task=lw.Task(EXAMPLES, labels=["ab", "ba", "c", "DD"]))
    found.save_pretrained(tmp_path / "with examples")
    read = lw.Composition.from_pretrained(tmp_path / "with examples", tiny_llama, tokenizer)
    assert [member.task.calibrated for member in read.members.values()] == [tuple(EXAMPLES)] * 2
    assert read.predict(["b", "x"]) == found.predict(["b", "x"])
    with pytest.raises(InvalidTask, match="for method 'auto' of a task with labels"):
        compose_on(inputs=inputs)


def test_an_average_has_no_adapter_and_says_where_one_is(compose, tmp_path):
    found = compose()
    for act in (
        lambda: found.adapter,
        lambda: found.weights,
        lambda: found.export(tmp_path / "out"),
        lambda: found.prune(),
        lambda: found.cut(2),
        lambda: found.tune(1),
    ):
        with pytest.raises(ScopeError, match=r"gradient and few_shot cannot .*members\['few_shot'\].*method='few_shot'"):
            act()
    assert "the average of gradient and few_shot" in repr(found)
    weights = found.members["gradient"].mean_weights
    assert found.mean_weights == pytest.approx({name: weight / 4 for name, weight in weights.items()})
    report = found.members["few_shot"].export(tmp_path / "out")
    assert len(lw.Adapter.from_pretrained(report.folder).card["prompts"]) == ORDERS


def test_an_adapter_that_answers_the_examples_already_is_taken_as_it_is(
    compose, tiny_llama, tokenizer, task, pool, tmp_path
):
    learn = partial(lw.train_adapters, tiny_llama, tokenizer, steps=120, lr=3e-2, rank=16, progress=False)
    expert = learn({"it": task})["it"]
    found = compose({**pool.adapters, "it": expert})
    assert rows_of(found.report) == PLAIN
    assert found.report.chosen == "best_single"
    assert found.mean_weights == {"it": 1.0}
    assert "answers the examples already" in found.report.reason
    losses = [found.report[name].loss for name in ("best_single", "base", "in_context")]
    assert losses[0] < 0.5 * min(losses[1:])
    # with folds nothing is taken unseen
    assert "average" in rows_of(compose({**pool.adapters, "it": expert}, folds=2).report)
    # nor beside an adapter that answers as well from the examples in its prompts
    shown = lw.Task(EXAMPLES, instruction="swap", demonstrations=True)
    reader = lw.train_adapters(tiny_llama, tokenizer, {"reader": shown}, steps=120, lr=3e-2, rank=16, progress=False)[
        "reader"
    ]
    with lw.Hub(tmp_path / "hub") as hub:
        for adapter in (*pool.adapters.values(), expert):
            hub.add(adapter)
        assert compose(hub).report.chosen == "best_single"
        hub.add(reader, tags=["in-context"])
        found = compose(hub)
    assert found.report["in_context_adapter"].loss < 2 * found.report["best_single"].loss
    assert found.report.chosen == "average"


def test_an_adapter_that_only_writes_labels_is_not_taken_for_one_that_answers(compose, tiny_llama, tokenizer, pool):
    learn = partial(lw.train_adapters, tiny_llama, tokenizer, steps=120, lr=3e-2, rank=16, progress=False)
    examples = [("a", "no"), ("b", "yes"), ("cc", "no"), ("d", "no")]
    either = [(asked, label) for asked, _ in examples for label in ("yes", "no")]
    writer = learn({"writer": lw.Task(either, instruction="vote")})["writer"]
    found = compose({**pool.adapters, "writer": writer}, task=lw.Task(examples, instruction="vote", labels=["yes", "no"]))
    # it writes one of the labels, which prompts alone seldom do, whatever the input
    losses = [found.report[name].loss for name in ("best_single", "base", "in_context")]
    assert losses[0] < 0.5 * min(losses[1:])
    assert found.report.chosen == "average"


def test_labels_are_answered_already_where_they_are_not_right_by_luck(compose, tiny_llama, tokenizer, pool, tmp_path):
    learn = partial(lw.train_adapters, tiny_llama, tokenizer, steps=120, lr=3e-2, rank=16, progress=False)
    expert = learn({"it": lw.Task(EXAMPLES, instruction="swap")})["it"]
    # four labels, by one of four adapters: 4 / 4^4
    task = lw.Task(EXAMPLES, instruction="swap", labels=["ab", "ba", "c", "DD"])
    assert compose({**pool.adapters, "it": expert}, task=task).report.chosen == "best_single"
    votes = [("a", "no"), ("b", "yes"), ("cc", "no"), ("d", "no"), ("e f", "yes")]
    task = lw.Task(votes, instruction="vote", labels=["yes", "no"])
    voter = replace(learn({"voter": task})["voter"], card={"examples": ["a", "b"], "description": "vote"})
    # two labels, three and two times: .035 where retrieval finds it first, .14 as one of four
    with lw.Hub(tmp_path / "hub") as hub:
        for adapter in (*pool.adapters.values(), voter):
            hub.add(adapter)
        assert compose(hub, task=task).report.chosen == "best_single"
    assert compose({**pool.adapters, "voter": voter}, task=task).report.chosen == "average"


@pytest.mark.parametrize("frequencies", [(0.5, 0.5), (0.9, 0.1), (0.2, 0.2, 0.6)], ids=str)
@pytest.mark.parametrize("num_adapters", [1, 3])
def test_luck_bounds_how_often_labels_drawn_at_random_suit_some_adapter(frequencies, num_adapters):
    num_labels, num_examples = len(frequencies), 6
    p_ANL = np.random.default_rng(0).dirichlet([0.3] * num_labels, size=(num_adapters, num_examples))
    # and one that always says the most frequent label
    p_ANL[0] = 1e-3
    p_ANL[0, :, np.argmax(frequencies)] = 1 - 1e-3 * (num_labels - 1)
    found = []
    for labels in itertools.product(range(num_labels), repeat=num_examples):
        losses_AN = [[-math.log(p_L[label]) for p_L, label in zip(p_NL, labels, strict=True)] for p_NL in p_ANL]
        least = min(ways.luck(losses_N, labels, num_adapters) for losses_N in losses_AN)
        found.append((least, math.prod(frequencies[label] for label in labels)))
    assert sum(drawn for _, drawn in found) == pytest.approx(1.0)
    for bound in (0.05, 0.2, 0.5, 0.9):
        assert sum(drawn for least, drawn in found if least <= bound) <= bound


def test_luck_is_the_share_of_labels_that_are_as_frequent_where_an_adapter_is_sure():
    # 3/5 and 2/5 to the number of each; of one label alone nothing can be said
    assert ways.luck([0.0] * 5, list("AABBB"), 1) == pytest.approx(0.4**2 * 0.6**3, rel=1e-12)
    assert ways.luck([0.1] * 5, list("AABBB"), 2) == pytest.approx(2 * 0.4**2 * 0.6**3 * math.exp(0.5), rel=1e-12)
    assert ways.luck([0.0] * 5, list("AAAAA"), 1) == 1.0
    assert ways.luck([2000.0] * 5, list("ABCDE"), 1) == ways.luck([math.nan] * 5, list("ABCDE"), 1) == 1.0


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"budget": 39}, "auto's budget of 39 is below 40"),
        ({"budget": 5}, "auto's budget of 5 is below 40"),
        ({"budget": None, "seconds": 0.4}, "seconds=0.4 bounds auto"),
        ({"seconds": 5.0}, "seconds=5 bounds auto"),
    ],
    ids=str,
)
def test_a_small_budget_and_a_time_limit_leave_the_training_out_and_the_report_says_so(compose, limits, why):
    found = compose(**limits)
    assert rows_of(found.report) == [*PLAIN, "gradient"]
    assert (found.report.chosen, found.members) == ("gradient", {})
    used = found.report["gradient"].evaluations
    said = f"auto became gradient; {why}, so that it trains nothing, and gradient used {used} evaluations"
    assert found.report.reason == said


def test_the_search_makes_no_more_evaluations_than_its_budget(compose):
    assert compose(budget=10).report["gradient"].evaluations == 10
    report = compose(budget=1000).report
    assert report["gradient"].evaluations == 10
    assert report["few_shot"].evaluations == 3 * FEW_SHOT.steps


@pytest.mark.parametrize("seed", range(3))
def test_with_folds_the_lowest_loss_on_held_out_examples_is_returned(compose, seed):
    report = compose(seed=seed, folds=2).report
    held_out = {row.name: row.held_out_loss for row in report.rows}
    assert report.chosen == min(held_out, key=held_out.get)
    assert held_out["average"] == pytest.approx((held_out["gradient"] + 3 * held_out["few_shot"]) / 4)
    assert 0.0 <= report["average"].held_out_hits <= 1.0


def test_objectives_without_gradients_are_searched_without_them(compose, tiny_llama, make_adapter):
    equal = [make_adapter(tiny_llama, name, seed=seed) for seed, name in enumerate("ab")]
    for options in ({"objective": "exact_match"}, {"space": "factors"}, {"objective": lambda model, examples: 1.0}):
        report = compose(equal, budget=40, **options).report
        assert rows_of(report) == [*PLAIN, "lorahub"], (options, report.reason)
        assert report["lorahub"].evaluations == 40
        assert report.reason.startswith(
            "auto became lorahub; auto is given another loss than the task's, or another meaning"
        )


def test_a_search_whose_candidates_all_fail_is_left_out(compose, pool, monkeypatch):
    num_layers = len({layer for adapter in pool.adapters.values() for layer in adapter.layers})

    def failing(objectives, candidates):
        return [([math.nan] * len(asked), [torch.zeros(1, 1, num_layers, 3)] * len(asked)) for asked in candidates]

    monkeypatch.setattr(learning, "together_with_gradients", failing)
    found = compose()
    assert rows_of(found.report) == [*PLAIN, "few_shot"]
    assert "gradient was left out: none of" in found.report.reason
    assert (found.report.chosen, found.members) == ("few_shot", {})
    assert found.task.orders == ORDERS


def test_demonstrations_beyond_the_models_context_are_left_out(compose, tiny_gpt2, make_adapter):
    pool = [make_adapter(tiny_gpt2, name, seed=seed, targets=("c_attn",)) for seed, name in enumerate("ab")]
    long = lw.Task([("a" * 20, "b"), ("c" * 20, "d"), ("e" * 20, "f")])
    report = compose(pool, model=tiny_gpt2, task=long).report
    assert rows_of(report) == [*PLAIN[:3], "gradient"]
    assert "in_context was left out: row" in report.reason
    assert "few_shot was left out: row" in report.reason


@pytest.mark.parametrize("folds", [0, 2])
def test_where_nothing_is_learned_the_better_of_base_and_best_single_is_returned(compose, folds):
    report = compose(folds=folds, objective=lambda model, examples: math.nan).report
    assert rows_of(report) == PLAIN
    assert report[report.chosen].loss == min(report["base"].loss, report["best_single"].loss)
    assert "lorahub was left out: none of" in report.reason


def test_an_interrupted_training_resumes_to_the_same_composition(compose, interrupt_search, tmp_path):
    whole = compose(method="lorahub", budget=30, folds=0)
    interrupt_search()
    with pytest.raises(KeyboardInterrupt):
        compose(method="lorahub", budget=30, folds=0, checkpoint=tmp_path)
    resumed = compose(method="lorahub", budget=30, folds=0, checkpoint=tmp_path)
    assert resumed.losses() == pytest.approx(whole.losses(), abs=1e-6)
    first, again = (compose(checkpoint=tmp_path / "auto") for _ in range(2))
    assert again.losses() == pytest.approx(first.losses(), abs=1e-6)


def test_a_start_is_named_or_given_as_weights(compose, pool):
    for start in ("base", "uniform", "best_single", "best_three", {"a": 0.5}):
        report = compose(method="gradient", start=start, budget=6, folds=0).report
        assert report["gradient"].num_trained == 3 * len({layer for a in pool.adapters.values() for layer in a.layers})
    with pytest.raises(UnknownName, match="did you mean 'best_single'"):
        compose(method="gradient", start="best_singl")


def test_entropy_looks_at_inputs_and_never_at_targets_and_needs_no_examples(compose_on, tiny_llama, tokenizer, tmp_path):
    options = {"method": "gradient", "objective": "entropy", "start": "uniform", "inputs": ["c", "d e", "f"], "budget": 8}
    rows = [[(text, target) for text in ("a", "b")] for target in ("x", "y z")]
    *told, found = (compose_on(task=lw.Task(each, instruction="swap"), folds=0, **options) for each in (*rows, []))
    assert all(each.report["gradient"].by_layer == found.report["gradient"].by_layer for each in told)
    (row,) = found.report.rows
    assert (row.name, row.loss, row.held_out_loss, row.held_out_hits) == ("gradient", None, None, None)
    assert found.report.chosen == "gradient"
    assert "gradient" in str(found.report.table())
    found.save_pretrained(tmp_path / "kept")
    assert lw.Composition.from_pretrained(tmp_path / "kept", tiny_llama, tokenizer).report.rows == found.report.rows


def test_what_needs_examples_says_so(compose_on):
    task = lw.Task([], instruction="swap")
    for options in (
        {"method": "lorahub"},
        {"method": "gradient", "objective": "entropy"},
        {"method": "auto"},
        {"method": "best_single"},
    ):
        with pytest.raises(InvalidTask, match=r"no examples; give at least two .* or inputs="):
            compose_on(task=task, **options)
    with pytest.raises(WeightingError, match="start 'best_three' is found on examples"):
        compose_on(task=task, method="gradient", objective="entropy", inputs=["a"])


def test_one_adapter_alone_is_not_searched_but_its_strength_is(compose, pool):
    one = pool.subset(["a"])
    with pytest.raises(WeightingError, match="'lorahub' weighs adapters against each other, but there is only 'a'"):
        compose(one, method="lorahub")
    found = compose(one, method="grid", folds=0).report["grid"].weights
    assert set(found) <= {"a"}
    assert rows_of(compose(one).report) == [*PLAIN, "few_shot"]


@pytest.mark.parametrize(
    ("options", "num_folds"),
    [({"method": "lorahub", "budget": 11}, 3), ({"method": "random", "budget": 5, "folds": 0}, 0), ({"budget": 32}, 0)],
)
def test_the_bar_ends_at_its_total(compose, options, num_folds, pool, monkeypatch):
    completed, totals = shown_by_the_bar(monkeypatch)
    compose(progress=True, **options)
    each = ways.EACH if options.get("method") is None else options["budget"]
    assert completed[-1] == totals[-1] == len(pool) + (num_folds + 1) * each


@pytest.mark.parametrize("options", [{"budget": None, "seconds": 0.4}, {"budget": 150}, {"budget": 10}], ids=str)
def test_the_bar_never_runs_past_its_total_and_ends_there(compose, options, pool, monkeypatch):
    completed, totals = shown_by_the_bar(monkeypatch)
    compose(progress=True, **options)
    assert completed[-1] == totals[-1] > len(pool)
    assert all(total is None or done <= total for done, total in zip(completed, totals, strict=True))


def shown_by_the_bar(monkeypatch):
    """What is completed and the total, after every update of a bar."""
    completed, totals = [], []
    update = Progress.update

    def spy(bar, task, **changes):
        update(bar, task, **changes)
        completed.append(bar.tasks[task].completed)
        totals.append(bar.tasks[task].total)

    monkeypatch.setattr(Progress, "update", spy)
    return completed, totals


def test_one_example_is_shown_in_every_prompt_since_nothing_compares_ways_on_it(
    compose, pool, tiny_llama, tokenizer, tmp_path
):
    one = lw.Task(EXAMPLES[:1], instruction="swap")
    found = compose(task=one)
    assert rows_of(found.report) == PLAIN
    assert (found.report.chosen, found.is_base) == ("in_context", True)
    assert found.task.prompt("e") == "swap\nInput: a\nOutput: ab\n\nswap\nInput: e\nOutput:"
    reader = lw.train_adapters(tiny_llama, tokenizer, {"reader": one}, steps=5, rank=2, progress=False)["reader"]
    with lw.Hub(tmp_path / "hub") as hub:
        for adapter in pool.adapters.values():
            hub.add(adapter)
        hub.add(reader, tags=["in-context"])
        found = compose(hub, task=one)
        assert list(found.members) == ["in_context", "in_context_adapter"]
        assert [member.task.demonstrations for member in found.members.values()] == [tuple(EXAMPLES[:1])] * 2
        assert found.members["in_context_adapter"].adapter.hash == reader.hash
        # what answers it already counts where retrieval finds it too
        expert = lw.train_adapters(tiny_llama, tokenizer, {"it": one}, steps=120, lr=3e-2, rank=16, progress=False)["it"]
        hub.add(replace(expert, card={"examples": ["a"], "description": "swap"}))
        assert compose(hub, task=one).report.chosen == "best_single"
        hub.update("it", examples=["nothing like it, at any rate"], description="count the sheep")
        assert compose(hub, task=one).report.chosen == "average"
