"""The settings of a router's training."""

from __future__ import annotations

import pytest

from loraweave.composer.train.settings import RouterSettings
from loraweave.errors import TrainingError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"step": 3}, "no setting 'step', did you mean 'steps'"),
        ({"steps": 0}, r"fit\(\) got steps=0; it takes a whole number of at least 1"),
        ({"seed": "a"}, "got seed='a'; it takes a whole number of at least 0 and below 4294967296"),
        ({"seed": -1}, "got seed=-1"),
        ({"batch_size": True}, "got batch_size=True"),
        ({"gradient_accumulation": 0}, "got gradient_accumulation=0"),
        ({"lr": 0.0}, "got lr=0.0"),
        ({"lr": float("nan")}, "got lr=nan"),
        ({"lr": "fast"}, "got lr='fast'; it takes a finite number above 0 or None"),
        ({"lr": 1e38}, "lr is 1e\\+38 and weight_decay 0.0: AdamW's steps would be beyond 3.4e\\+38"),
        ({"lr": 1.0, "weight_decay": 1e300}, "lr is 1.0 and weight_decay 1e\\+300"),
        ({"balance": True}, "got balance=True"),
        ({"clip": 0}, "got clip=0"),
        ({"warmup": -1}, "got warmup=-1"),
        ({"balance": -1.0}, "got balance=-1.0"),
        ({"z": float("inf")}, "got z=inf"),
        ({"mixed_precision": "bf32"}, "got mixed_precision='bf32'; it takes one of 'no', 'bf16'"),
        ({"patience": 2}, "there is no evaluation"),
        ({"patience": 0, "evaluation": [("a", "b")]}, "got patience=0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(gates, pool, given, said):
    with pytest.raises(TrainingError, match=said):
        RouterSettings.of(gates(pool), given)


def test_the_rate_is_the_routers_own_unless_another_is_given(gates, pool):
    assert RouterSettings.of(gates(pool), {}).lr == 0.05
    assert RouterSettings.of(gates(pool), {"lr": None}).lr == 0.05
    assert RouterSettings.of(gates(pool), {"lr": 0.2}).lr == 0.2
