"""What capacity takes away in training is counted where a target is predicted, and told."""

import math
import warnings

import pytest

import loraweave as lw

SETTINGS = {"steps": 1, "batch_size": 5, "warmup": 0, "progress": False}
# two targets after prompts of 2 to 6 tokens
ROWS = [{"input_ids": [3 + i, *[9] * (1 + i), 5, 6], "labels": [-100] * (2 + i) + [5, 6]} for i in range(5)]


def trained(model, **options):
    settings = {name: options.pop(name) for name in ("steps", "gradient_accumulation", "batch_size") if name in options}
    made = lw.experts("switch", model, rank=2, target_modules=("q_proj", "down_proj"), balance=0.0, **options)
    return made.fit(ROWS, **{**SETTINGS, **settings}).training_report


@pytest.mark.parametrize("capacity", [0.5, 0.6])
def test_a_single_expert_has_no_more_than_the_first_tokens_of_a_row(make_model, capacity):
    lengths = [len(row["input_ids"]) for row in ROWS]
    before = [(place, math.ceil(capacity * length)) for length in lengths for place in (length - 3, length - 2)]
    dropped = sum(place >= limit for place, limit in before) / len(before)
    assert 0 < dropped < 1
    assert trained(make_model("llama"), num_experts=1, capacity=capacity).overflow == [pytest.approx(dropped)]


def test_passes_of_a_step_are_counted_together(make_model):
    whole, parted = (
        trained(make_model("llama"), num_experts=2, capacity=0.5, batch_size=4, gradient_accumulation=passes)
        for passes in (None, 2)
    )
    assert whole.overflow == parted.overflow


def test_much_overflow_is_warned_of_once_with_the_way_out(make_model):
    with pytest.warns(UserWarning, match="learned from: take prioritised=True, a larger capacity, None for no") as found:
        report = trained(make_model("llama"), num_experts=2, capacity=0.3, steps=30)
    assert len([warning for warning in found if "no capacity left" in str(warning.message)]) == 1
    assert len(report.overflow) == 30


def test_without_a_limit_nothing_overflows(make_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained(make_model("llama"), num_experts=3, capacity=None, steps=25).overflow == []
