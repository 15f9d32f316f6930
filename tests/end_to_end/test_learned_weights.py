"""Weights learned on five examples of a task that joins two skills, on the real base model."""

from __future__ import annotations

from pathlib import Path

import pytest

import loraweave as lw
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.extensions.tour import load_task
from loraweave.registry import get
from loraweave.routers.searches.gradient import Gradient
from loraweave.routers.searches.lorahub import Lorahub

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("negation", "passive", "paraphrase", "past_tense", "synonym")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft.*")]


@pytest.fixture(scope="module")
def objective():
    model, tokenizer = lw.load_base()
    pool = lw.ExpertPool([lw.Adapter.from_pretrained(EXAMPLES / "pool" / name) for name in NAMES])
    task = load_task(EXAMPLES / "data", "negated_passive", 0, 1).task
    return ExampleLoss(lw.Composer(model, pool), tokenizer, task, l1=0.0)


@pytest.fixture(scope="module")
def best_single(objective):
    return min(objective([lw.MixtureWeights.of({name: 1.0}, NAMES) for name in NAMES]))


@pytest.mark.parametrize("form", ["free", "softmax"])
def test_a_few_steps_on_weights_by_layer_beat_every_adapter_alone(form, objective, best_single):
    layers = list(objective.engine.target_layers)
    result = Gradient(NAMES, form=form, layers=layers, budget=10).solve(objective)
    assert result.num_trained == len(NAMES) * len(layers)
    assert result.loss < best_single


def test_with_gradients_no_search_ends_above_lorahub_at_the_same_number_of_evaluations(objective):
    layers = list(objective.engine.target_layers)
    hub = Lorahub(NAMES, budget=12).solve(objective)
    solvers = [Gradient(NAMES, layers=layers, budget=12)]
    if "first_order" in lw.names("routers"):
        solvers.append(get("routers", "first_order")(NAMES, budget=12))
    for solver in solvers:
        result = solver.solve(objective)
        assert result.evaluations <= hub.evaluations
        assert result.loss <= hub.loss
