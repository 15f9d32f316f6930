"""Options of routers and settings of searches that are refused, by name, when one is made."""

import math
import re

import pytest

import loraweave as lw
from loraweave.errors import UnknownName, WeightingError
from loraweave.extend import get

COUNT, POSITIVE, COEFFICIENT = "a whole number of at least 1", "a finite number above 0", "a finite number of at least 0"


@pytest.fixture
def pool(random_pool):
    return random_pool(*[{"q": (1, 4, 3)}] * 3)


@pytest.mark.parametrize(
    ("name", "option", "value", "kind"),
    [
        ("adapter_fusion", "dim", 0, COUNT + " or None"),
        ("adapter_fusion", "temperature", 0, POSITIVE),
        ("lora_flow", "width", 0, COUNT + " or None"),
        ("lorauter", "temperature", -1.0, POSITIVE),
        ("lorauter", "num_tasks", 0, COUNT),
        ("mixture_of_adapters", "eta", -1, COEFFICIENT),
        ("ramole", "rank", 0, COUNT),
        ("ramole", "dropout", 1.0, COEFFICIENT + " and below 1"),
    ],
)
def test_a_value_outside_its_kind_is_refused(name, option, value, kind, pool):
    with pytest.raises(WeightingError, match=re.escape(f"router {name!r} got {option}={value!r}; it takes {kind}") + "$"):
        lw.router(name, pool, **{option: value})


@pytest.mark.parametrize(
    ("name", "option", "word", "known"),
    [
        ("lora_flow", "bias", "inner", "'outside', 'inside'"),
        ("mixture_of_adapters", "decision", "sequense", "'sequence', 'token', did you mean 'sequence'?"),
    ],
)
def test_a_word_that_is_not_known_is_answered_with_those_that_are(name, option, word, known, pool):
    with pytest.raises(UnknownName, match=re.escape(f"{option}={word!r}; it takes one of {known}") + "$"):
        lw.router(name, pool, **{option: word})


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("lag", "candidates"),
        ("lorauter", "best"),
    ],
)
def test_a_number_of_experts_that_the_pool_lacks_is_refused(name, option, pool):
    with pytest.raises(WeightingError, match=f"router '{name}' got {option}=4, but the pool has 3 experts"):
        lw.router(name, pool, **{option: 4})


def test_fewer_candidates_than_are_chosen_of_them_are_refused(pool):
    with pytest.raises(WeightingError, match="top_k=3 of candidates=2"):
        lw.router("lag", pool, candidates=2, top_k=3)


@pytest.mark.parametrize(
    ("name", "num_experts", "options", "message"),
    [
        ("bayesian", 3, {"budget": 2}, "budget is 2 evaluations, but Bayesian needs at least 3, 2 initial candidates"),
        ("bayesian", 3, {"initial": 40}, "budget is 40 evaluations, but Bayesian needs at least 41"),
        ("bayesian", 3, {"initial": 1}, "got initial=1;"),
        ("bayesian", 3, {"population": 0}, "got population=0;"),
        ("first_order", 2, {"budget": 3}, "budget is 3 evaluations, but FirstOrder needs at least 4"),
        ("first_order", 2, {"radius": 0.0}, "got radius=0.0;"),
        ("first_order", 2, {"radius": math.inf}, "got radius=inf;"),
        ("first_order", 2, {"ridge": -1.0}, "got ridge=-1.0;"),
        ("first_order", 2, {"ridge": math.nan}, "got ridge=nan;"),
        ("first_order", 2, {"start": {"x": 1.0}}, "'x'"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(name, num_experts, options, message):
    with pytest.raises(WeightingError, match=message):
        get("routers", name)("abcd"[:num_experts], **options)
