"""A function of the user's as the objective: what it is called with, and what becomes of its errors."""

from __future__ import annotations

import math

import pytest
import torch

import loraweave as lw
from loraweave.composer.compose.loss import ExampleLoss, Penalty, together
from loraweave.errors import InvalidTask, UnknownName
from loraweave.routers.searches.lorahub import Lorahub

TASK = lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c")])
IDS = torch.tensor([[5, 6, 7]])


def candidates(*weights):
    return [lw.MixtureWeights.of({"a": weight}, "abc") for weight in weights]


def user_loss(engine, function, **options):
    return ExampleLoss(engine, None, TASK, kind=function, **options)


def last_logit(model, examples):
    return float(model(input_ids=IDS).logits[0, -1, 9]) + len(examples)


@pytest.mark.parametrize("method", ["linear", "factor_sum"])
def test_the_function_sees_the_model_with_the_candidate_active(method, engine):
    objective = user_loss(engine, last_logit, merge_method=method, l1=0.05)
    found = objective(candidates(0.0, 0.5))
    for loss, weight in zip(found, (0.0, 0.5), strict=True):
        with torch.no_grad(), engine.fused({"a": weight}, method=method):
            expected = last_logit(engine.model, TASK.examples) + 0.05 * weight / 3
        assert loss == pytest.approx(expected, rel=1e-4)
    assert not engine.active


def test_the_function_gets_the_examples_of_the_view(engine):
    seen = []
    view = user_loss(engine, lambda model, examples: seen.append(examples) or 1.0).view([2, 0]).penalised(Penalty(0.0))
    assert view(candidates(0.5)) == [1.0]
    assert seen == [[("cc", "c"), ("a", "ab")]]


@pytest.mark.own_models
def test_the_model_is_evaluated_and_takes_no_part_in_gradients(engine):
    engine.model.train()
    states = []
    objective = user_loss(engine, lambda model, _: states.append((model.training, torch.is_grad_enabled())) or 0.0)
    objective(candidates(0.5))
    assert states == [(False, False)]
    assert engine.model.training


@pytest.mark.parametrize(
    ("what", "why"), [(math.nan, "its loss is nan"), ("much", "ValueError: could not"), (None, "TypeErr")]
)
def test_what_is_no_finite_number_is_nan_and_counted(what, why, engine):
    answers = iter([1.0, what, 2.0, what])
    objective = user_loss(engine, lambda *_: next(answers), l1=0.0)
    found = objective(candidates(0.1, 0.2, 0.3, 0.4))
    assert found[::2] == [1.0, 2.0]
    assert all(map(math.isnan, found[1::2]))
    assert objective.failures.count == 2
    assert objective.failures.first.startswith(why)


def test_an_interruption_passes_through_and_leaves_nothing_active(engine):
    def interrupted(model, examples):
        raise KeyboardInterrupt

    objective = user_loss(engine, interrupted)
    with pytest.raises(KeyboardInterrupt):
        objective(candidates(0.1))
    assert not engine.active
    assert objective.failures.count == 0


def test_functions_are_asked_fold_by_fold(engine):
    objective = user_loss(engine, lambda model, examples: float(len(examples)), l1=0.0)
    views = [objective.view([0, 1]), objective.view([2])]
    assert together(views, [candidates(0.1, 0.2), candidates(0.3)]) == [[2.0, 2.0], [1.0]]


def test_a_search_minimises_what_the_function_gives(engine):
    def distance(model, examples):
        return abs(float(model(input_ids=IDS).logits[0, -1, 9]) - goal)

    with torch.no_grad(), engine.activate({"a": 0.3}):
        goal = float(engine.model(input_ids=IDS).logits[0, -1, 9])
    objective = user_loss(engine, distance, l1=0.0)
    result = Lorahub(["a", "b", "c"], budget=80).solve(objective)
    assert result.loss < 0.1 * objective(candidates(0.0))[0]


def test_objectives_are_made_by_name_or_of_functions(engine, tokenizer):
    made = ExampleLoss(engine, tokenizer, TASK, kind="exact_match", l1=0.1, sparsity=0.2)
    assert (type(made.kind).__name__, made.penalty.l1, made.penalty.sparsity) == ("ExactMatch", 0.1, 0.2)
    own = ExampleLoss(engine, tokenizer, TASK, kind=last_logit, merge_method="ties", l2=0.3)
    assert (own.function, own.merge_method, own.penalty.l2) == (last_logit, "ties", 0.3)
    with pytest.raises(UnknownName, match="did you mean 'exact_match'"):
        ExampleLoss(engine, tokenizer, TASK, kind="exactmatch")
    with pytest.raises(InvalidTask, match="inputs are for 'entropy'"):
        ExampleLoss(engine, tokenizer, TASK, kind=last_logit, inputs=["a"])
