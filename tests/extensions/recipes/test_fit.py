"""Training of recipes: names of tasks that are told apart from others, and what capacity takes away."""

from __future__ import annotations

import math
import warnings

import pytest

import loraweave as lw
from loraweave.errors import UnknownName

SETTINGS = {"steps": 3, "batch_size": 4, "warmup": 0, "progress": False}


ROWS = [
    {"input_ids": [3 + i, *[9] * (1 + i % 3), 5 + i, 6], "labels": [-100, *[-100] * (1 + i % 3), 5 + i, 6]} for i in range(7)
]


NAMED = {
    "mixture_of_loras": {"tasks": ("facts", "games")},
    "loramoe": {"tasks": ("facts", "games"), "knowledge": ("facts",)},
}


@pytest.mark.parametrize("recipe", NAMED)
def test_a_task_that_is_none_of_the_recipe_s_is_refused_by_name(make_model, recipe):
    with pytest.raises(UnknownName, match=r"dataset\['fact'\]: .* no task 'fact', did you mean 'facts'"):
        lw.experts(recipe, make_model("llama"), **NAMED[recipe]).fit({"fact": ROWS, "games": ROWS}, **SETTINGS)


def test_experts_that_few_tokens_choose_are_waited_for(make_model):
    # two tokens a step
    rows = [{"input_ids": [3 + i, 20 + i], "labels": [-100, 20 + i]} for i in range(7)]
    made = lw.experts("switch", make_model("llama"), rank=2).fit(rows, **{**SETTINGS, "batch_size": 1, "steps": 8})
    assert len(made.training_report.losses) == 8


ONE_STEP = {"steps": 1, "batch_size": 5, "warmup": 0, "progress": False}


# two targets after prompts of 2 to 6 tokens
PROMPTED = [{"input_ids": [3 + i, *[9] * (1 + i), 5, 6], "labels": [-100] * (2 + i) + [5, 6]} for i in range(5)]


def trained(model, **options):
    settings = {name: options.pop(name) for name in ("steps", "gradient_accumulation", "batch_size") if name in options}
    made = lw.experts("switch", model, rank=2, target_modules=("q_proj", "down_proj"), balance=0.0, **options)
    return made.fit(PROMPTED, **{**ONE_STEP, **settings}).training_report


@pytest.mark.parametrize("capacity", [0.5, 0.6])
def test_a_single_expert_has_no_more_than_the_first_tokens_of_a_row(make_model, capacity):
    lengths = [len(row["input_ids"]) for row in PROMPTED]
    before = [(place, math.ceil(capacity * length)) for length in lengths for place in (length - 3, length - 2)]
    dropped = sum(place >= limit for place, limit in before) / len(before)
    assert 0 < dropped < 1
    assert trained(make_model("llama"), num_experts=1, capacity=capacity).overflow == [pytest.approx(dropped)]


def test_much_overflow_is_warned_of_once_with_the_way_out(make_model):
    with pytest.warns(UserWarning, match="learned from: take prioritised=True, a larger capacity, None for no") as found:
        report = trained(make_model("llama"), num_experts=2, capacity=0.3, steps=30)
    assert len([warning for warning in found if "no capacity left" in str(warning.message)]) == 1
    assert len(report.overflow) == 30


def test_passes_of_a_step_are_counted_together(make_model):
    whole, parted = (
        trained(make_model("llama"), num_experts=2, capacity=0.5, batch_size=4, gradient_accumulation=passes)
        for passes in (None, 2)
    )
    assert whole.overflow == parted.overflow


def test_without_a_limit_nothing_overflows(make_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained(make_model("llama"), num_experts=3, capacity=None, steps=25).overflow == []


def test_the_way_out_names_what_the_recipe_has(make_model):
    made = lw.experts(
        "mixlora", make_model("llama"), rank=2, num_experts=2, routing="switch", capacity=0.3, balance=0.0, z=0.0
    )
    with pytest.warns(UserWarning, match="learned from: take a larger capacity, None for no"):
        made.fit(PROMPTED, **{**ONE_STEP, "steps": 30})
