"""Which measurements benchmarks/routers.py takes for done."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("_unseen_store", "_router_quality")


@pytest.fixture(scope="module")
def quality():
    """The benchmark's module; it is a script and not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield [import_module(name) for name in MODULES][-1]
    for name in MODULES:
        sys.modules.pop(name)


def asked(quality, *given):
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    return parser.parse_args(["--out", "runs", *given])


@pytest.mark.parametrize(
    ("way", "given", "expected"),
    [
        ("mole", [], {"steps": 60}),
        ("mole", ["--steps", "120", "--batch-size", "4", "--lr", "1e-2"], {"steps": 120, "batch_size": 4, "lr": 0.01}),
        ("xlora_layerwise", ["--lr", "1e-2"], {"steps": 60, "lr": 0.01}),
        ("one_lora", ["--lr", "1e-2"], {"steps": 60}),
        ("arrow", ["--steps", "120"], {}),
        ("lorauter", ["--steps", "120"], {}),
        ("oracle", ["--steps", "120"], {}),
    ],
)
def test_what_tells_trainings_apart_is_what_was_asked_for_beyond_the_defaults(quality, way, given, expected):
    assert quality._trained(asked(quality, *given), way) == expected


def test_only_what_was_measured_so_is_done(quality):
    known = {"steps": 60, "lr": 0.01, "made_s": 3.0}
    assert quality._was_trained_so(known, asked(quality, "--lr", "1e-2"), "mole")
    for other in ([], ["--lr", "1e-2", "--steps", "61"], ["--lr", "1e-2", "--batch-size", "4"], ["--lr", "1e-3"]):
        assert not quality._was_trained_so(known, asked(quality, *other), "mole")
    assert quality._was_trained_so({"made_s": 3.0}, asked(quality, "--steps", "61"), "arrow")
