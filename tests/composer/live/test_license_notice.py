"""A live mixture of adapters whose licenses exclude each other warns, row by row, and once."""

import dataclasses
import warnings

import pytest
import torch

import loraweave as lw

LICENSES = ("gpl-3.0", "cc-by-nc-4.0", "mit")


class Even:
    """A router: every expert alike."""

    def __init__(self, num_experts):
        self.num_experts = num_experts

    def weights(self, x_BTI, layer):
        return torch.full((1, 1, self.num_experts), 1 / self.num_experts)


@pytest.fixture
def engine(tiny_llama, make_adapters):
    pairs = zip(make_adapters(tiny_llama, "llama"), LICENSES, strict=True)
    return lw.Composer(tiny_llama, [dataclasses.replace(adapter, card={"license": license}) for adapter, license in pairs])


def warned(engine, mixture):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        engine.activate(mixture).close()
    return [str(each.message) for each in seen]


@pytest.mark.parametrize(
    "mixture",
    [
        {"a": 1.0},
        {"a": 1.0, "c": 1.0},
        {"a": 1.0, "b": 0.0},
        [{"a": 1.0}, {"b": 1.0}, None],
        [{"a": 1.0, "c": 0.5}, {"b": 1.0, "c": 0.5}],
        lw.MixtureWeights.of({"a": 1.0, "b": 0.0}, ["a", "b"]),
    ],
)
def test_what_fits_together_in_each_row_gives_no_word(engine, mixture):
    assert warned(engine, mixture) == []


@pytest.mark.parametrize(
    "mixture",
    [
        {"a": 1.0, "b": 1.0},
        [{"c": 1.0}, {"a": 0.1, "b": 0.5}],
        lw.MixtureWeights.of([{"a": 1.0, "b": 1.0}], ["a", "b"]),
        [lw.MixtureWeights.of({"a": 1.0, "b": 1.0}, ["a", "b"]), {"c": 1.0}],
        Even(3),
        [Even(3), None],
    ],
)
def test_a_mixture_of_licenses_that_exclude_each_other_warns(engine, mixture):
    [said] = warned(engine, mixture)
    assert "'a' is under GPL-3.0-only" in said
    assert "'b' under CC-BY-NC-4.0" in said


def test_it_is_said_once_in_a_program_and_the_mixture_works(engine):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            engine.activate({"a": 1.0, "b": 1.0}).close()
        with engine.fused({"a": 1.0, "b": 1.0}):
            pass
    assert len(seen) == 1


def test_fusing_and_switching_warn_too(engine):
    with pytest.warns(UserWarning, match="GPL-3.0-only"), engine.fused({"a": 1.0, "b": 1.0}):
        pass
    with engine.fused({"a": 1.0, "c": 1.0}) as fused, pytest.warns(UserWarning, match="GPL-3.0-only"):
        fused.switch({"a": 1.0, "b": 1.0})
