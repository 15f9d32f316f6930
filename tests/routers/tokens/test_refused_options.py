"""Options of token routers that are refused, by the router's and the option's name, when one is made."""

import re

import pytest
import torch

import loraweave as lw
from loraweave.errors import UnknownName, WeightingError
from loraweave.hub.embedders.hashing import Hashing
from loraweave.types import Factors

COUNT, POSITIVE, COEFFICIENT = "a whole number of at least 1", "a finite number above 0", "a finite number of at least 0"
RATE = "a finite number of at least 0 and below 1"


@pytest.fixture
def pool():
    return lw.ExpertPool([lw.Adapter(name, "tiny", {"q": Factors(torch.ones(1, 4), torch.ones(3, 1))}) for name in "abc"])


@pytest.mark.parametrize(
    ("name", "option", "value", "kind"),
    [
        ("arrow", "top_k", 0, COUNT + " or None"),
        ("arrow", "temperature", "cold", POSITIVE),
        ("arrow", "temperature", 0.0, POSITIVE),
        ("arrow", "temperature", float("nan"), POSITIVE),
        ("arrow", "seed", "a", "a whole number of at least 0"),
        ("logistic", "inverse_penalty", 0.0, POSITIVE),
        ("mole", "balance", -1, COEFFICIENT),
        ("similarity", "temperature", 0.0, POSITIVE),
        ("similarity", "nearest", 0, COUNT + " or None"),
        ("similarity", "refresh", 0, COUNT),
        ("similarity", "embedder", Hashing(), "a text"),
        ("xlora", "temperature", 0.0, POSITIVE),
        ("xlora", "depth", 0, COUNT),
        ("xlora", "size", 2.5, COUNT),
        ("xlora", "dropout", 1.0, RATE),
        ("xlora", "global_scaling", float("nan"), POSITIVE + " or a finite number below 0"),
    ],
)
def test_a_value_outside_its_kind_is_refused(name, option, value, kind, pool):
    with pytest.raises(
        WeightingError, match=re.escape(f"router {name!r} got {option}={value!r:.80}; it takes {kind}") + "$"
    ):
        lw.router(name, pool, **{option: value})


@pytest.mark.parametrize(
    ("name", "option", "word", "known"),
    [
        ("arrow", "direction", "power_iterations", "'exact', 'power_iteration', did you mean 'power_iteration'?"),
        ("arrow", "input_norm", "l2", "'none', 'unit'"),
        ("logistic", "form", "mixture", "'selection', 'probabilities', 'top_p'"),
        ("similarity", "form", "mean", "'softmax', 'selection', 'mixture'"),
        ("similarity", "per", "layer", "'row', 'token'"),
        ("xlora", "softmax", "topk", "'top_k', 'all', 'twice', 'none', did you mean 'top_k'?"),
    ],
)
def test_a_word_that_is_not_known_is_answered_with_those_that_are(name, option, word, known, pool):
    with pytest.raises(UnknownName, match=re.escape(f"{option}={word!r}; it takes one of {known}") + "$") as caught:
        lw.router(name, pool, **{option: word})
    assert isinstance(caught.value, WeightingError)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("arrow", "top_k"),
        ("phatgoose", "top_k"),
        ("similarity", "nearest"),
        ("xlora", "top_k"),
    ],
)
def test_a_number_of_experts_that_the_pool_lacks_is_refused(name, option, pool):
    with pytest.raises(WeightingError, match=f"router '{name}' got {option}=4, but the pool has 3 experts"):
        lw.router(name, pool, **{option: 4})


def test_what_a_router_does_not_take_is_refused(pool):
    with pytest.raises(WeightingError, match="has no option 'topk', did you mean 'top_k'"):
        lw.router("arrow", pool, topk=2)
    with pytest.raises(WeightingError, match="a selection is of 1 expert"):
        lw.router(
            "similarity", pool, form="selection", nearest=2, embedder="hashing", examples={name: ["x"] for name in "abc"}
        )
    with pytest.raises(WeightingError, match=r"no live mixture does that.*compose"):
        lw.router("similarity", pool, form="fusion")
