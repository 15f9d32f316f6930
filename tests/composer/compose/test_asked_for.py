"""Compositions for which nothing is searched, and calls of compose() that wait for their model."""

from __future__ import annotations

from dataclasses import replace

import pytest

import loraweave as lw
from loraweave.composer.compose.compose import ComposeCall
from loraweave.composer.model import scoring
from loraweave.errors import InvalidLicense, InvalidTask, ScopeError, UnknownName, WeightingError


@pytest.fixture
def of(tiny_llama, tokenizer, task):
    """of(what, ..): the composition of it for the task."""
    return lambda what=None, **more: lw.Composition.of(tiny_llama, tokenizer, task, what, **more)


@pytest.fixture
def losses_under(tiny_llama, tokenizer, task, pool):
    """losses_under(mixture or router): those of the examples while a Composer has it active."""

    def losses(weights):
        with lw.Composer(tiny_llama, pool, tokenizer=tokenizer).activate(weights):
            return scoring.losses(tiny_llama, tokenizer, task, task.examples)

    return losses


def test_the_base_an_adapter_and_a_router_answer_as_while_they_are_active(of, losses_under, pool):
    router = lw.router("arrow", pool, top_k=1)
    assert of().is_base
    assert of().losses() == losses_under({})
    assert of(pool["a"]).losses() == pytest.approx(losses_under({"a": 1.0}), rel=1e-5)
    assert of(router, pool=pool).losses() == pytest.approx(losses_under(router), rel=1e-5)


def test_members_are_averaged_and_the_report_says_what_was_asked_for(of, pool):
    members = {name: of(pool[name]) for name in "ab"}
    average = of(members, name="both", seed=3)
    expected = [sum(pair) / 2 for pair in zip(*(member.losses() for member in members.values()), strict=True)]
    assert average.losses() == pytest.approx(expected, rel=1e-6)
    assert (average.report.chosen, average.report.reason, average.seed) == ("both", "as asked", 3)


def test_what_is_no_composition_is_refused(of, pool):
    with pytest.raises(WeightingError, match="compositions by name, not of 'a'"):
        of("a")
    with pytest.raises(WeightingError, match="a router and its pool"):
        of(lw.router("arrow", pool))
    with pytest.raises(ScopeError, match="member 'r' of an average is not one adapter"):
        of({"r": of(lw.router("arrow", pool), pool=pool)})


def test_a_call_is_refused_before_there_is_a_model_for_what_compose_refuses(pool, task):
    for arguments, error, said in (
        ({"method": "lorhub"}, UnknownName, "did you mean 'lorahub'"),
        ({"method": "lorahub", "sigm": 0.1}, WeightingError, "did you mean 'sigma'"),
        ({"method": "lorahub", "budget": 0}, WeightingError, "budget"),
    ):
        with pytest.raises(error, match=said):
            ComposeCall(pool, task, arguments)
    with pytest.raises(InvalidTask, match="the task is 3"):
        ComposeCall(pool, 3)
    licenses = {"a": "GPL-3.0-only", "b": "CC-BY-NC-4.0"}
    licensed = lw.ExpertPool([replace(pool[name], card={"license": license}) for name, license in licenses.items()])
    with pytest.raises(InvalidLicense, match="GPL-3"):
        ComposeCall(licensed, task)
    assert ComposeCall(licensed, task, {"allow_licenses": True}).task is task


def test_a_call_composes_as_compose_does_and_has_the_adapters_to_choose_from(pool, task, tiny_llama, tokenizer, compose_on):
    call = ComposeCall(pool, task, {"method": "lorahub", "budget": 9, "folds": 0, "seed": 1})
    composed = call(tiny_llama, tokenizer, progress=False)
    assert composed.weights == compose_on(method="lorahub", budget=9, folds=0, seed=1).weights
    assert call.engine(tiny_llama, tokenizer).pool.names == pool.names
    assert {"auto", "lorahub", "arrow"} <= set(ComposeCall.methods())


def test_of_a_hub_as_many_adapters_are_there_to_choose_from_as_the_call_says(pool, task, tiny_llama, tokenizer, tmp_path):
    with lw.Hub(tmp_path / "hub") as hub:
        for adapter in pool.adapters.values():
            hub.add(adapter)
        report = lw.compose(tiny_llama, tokenizer, hub, task, method="uniform", k=2, progress=False).report
        assert len(report.candidates) == 2
        engine = ComposeCall(hub, task, {"k": 2}).engine(tiny_llama, tokenizer)
        assert list(engine.pool.names) == [name for name, _ in report.candidates]
