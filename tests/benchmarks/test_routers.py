"""Which measurements of routers count as done."""

from __future__ import annotations

import pytest

from benchmarks.routers import Training


@pytest.mark.parametrize(
    ("way", "asked", "expected"),
    [
        ("mole", {}, {"steps": 60}),
        ("mole", {"steps": 120, "batch_size": 4, "lr": 1e-2}, {"steps": 120, "batch_size": 4, "lr": 0.01}),
        ("xlora_layerwise", {"lr": 1e-2}, {"steps": 60, "lr": 0.01}),
        ("one_lora", {"lr": 1e-2}, {"steps": 60}),
        ("arrow", {"steps": 120}, {}),
        ("lorauter", {"steps": 120}, {}),
        ("oracle", {"steps": 120}, {}),
    ],
)
def test_what_tells_trainings_apart_is_what_was_asked_for_beyond_the_defaults(way, asked, expected):
    assert Training(**asked).of(way) == expected


def test_only_what_was_measured_so_is_done():
    known = {"steps": 60, "lr": 0.01, "made_s": 3.0}
    assert Training(lr=1e-2).made(known, "mole")
    for other in ({}, {"lr": 1e-2, "steps": 61}, {"lr": 1e-2, "batch_size": 4}, {"lr": 1e-3}):
        assert not Training(**other).made(known, "mole")
    assert Training(steps=61).made({"made_s": 3.0}, "arrow")
