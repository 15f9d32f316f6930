"""The settings of a router's training."""

from __future__ import annotations

import pytest

from loraweave.composer.train.settings import RouterSettings
from loraweave.errors import TrainingError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"step": 3}, "no setting 'step', did you mean 'steps'"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"gradient_accumulation": 0}, "gradient_accumulation is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": "fast"}, "lr is 'fast'; it must be a number"),
        ({"lr": 1e38}, "lr is 1e\\+38 and weight_decay 0.0: AdamW's steps would be beyond 3.4e\\+38"),
        ({"lr": 1.0, "weight_decay": 1e300}, "lr is 1.0 and weight_decay 1e\\+300"),
        ({"checkpoint": 3}, "checkpoint is 3; it must be a folder"),
        ({"balance": True}, "balance is True; it must be a number"),
        ({"clip": 0}, "clip is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"balance": -1.0}, "balance is -1.0"),
        ({"z": float("inf")}, "z is inf"),
        ({"mixed_precision": "bf32"}, "mixed_precision is 'bf32'"),
        ({"patience": 2}, "there is no evaluation"),
        ({"patience": 0, "evaluation": [("a", "b")]}, "patience is 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(gates, pool, given, said):
    with pytest.raises(TrainingError, match=said):
        RouterSettings.of(gates(pool), given)


def test_the_rate_is_the_routers_own_unless_another_is_given(gates, pool):
    assert RouterSettings.of(gates(pool), {}).lr == 0.05
    assert RouterSettings.of(gates(pool), {"lr": None}).lr == 0.05
    assert RouterSettings.of(gates(pool), {"lr": 0.2}).lr == 0.2


def test_the_rate_warms_up_and_goes_to_0_as_half_a_cosine(gates, pool):
    settings = RouterSettings.of(gates(pool), {"lr": 1.0, "warmup": 2, "steps": 6})
    assert [settings.rate(step) for step in range(6)] == pytest.approx([0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466])
