"""Weights from retrieval scores: the formulas of LoraRetriever and of token-level adaptation."""

from __future__ import annotations

import math

import pytest
import torch

from loraweave.errors import UnknownExpert, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.searches.similarity import Similarity
from loraweave.types import Factors

NAMES = ("a", "b", "c", "d", "e")
SCORES = {"c": 0.8, "a": -0.2, "d": 0.5, "b": 0.79}


def weights(**options):
    return Similarity(NAMES, scores=options.pop("scores", SCORES), **options).ask()[0].as_dict()


def test_a_softmax_is_exp_of_score_over_temperature_by_the_sum_of_all():
    powers = {name: math.exp(score / 0.25) for name, score in SCORES.items()}
    expected = {name: powers.get(name, 0.0) / sum(powers.values()) for name in NAMES}
    assert weights(form="softmax", temperature=0.25) == pytest.approx(expected, rel=1e-6)


def test_the_softmax_of_cosines_to_centroids_is_that_of_token_level_adaptation():
    centroids = torch.randn(5, 7, dtype=torch.float64)
    context = torch.randn(7, dtype=torch.float64)
    cosines = torch.nn.functional.cosine_similarity(centroids, context[None])
    found = weights(scores=dict(zip(NAMES, cosines.tolist(), strict=True)), temperature=0.05)
    assert list(found.values()) == pytest.approx(torch.softmax(cosines / 0.05, dim=0).tolist(), rel=1e-6)


def test_a_softmax_of_the_k_nearest_leaves_the_others_out():
    ratio = math.exp((0.8 - 0.79) / 0.1)
    expected = {"a": 0, "b": 1 / (1 + ratio), "c": ratio / (1 + ratio), "d": 0, "e": 0}
    assert weights(form="softmax", nearest=2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 1e-320])
def test_at_a_low_temperature_the_nearest_has_all_the_weight(temperature):
    assert weights(temperature=temperature) == {"a": 0, "b": 0, "c": 1, "d": 0, "e": 0}


def test_a_selection_is_the_nearest_alone():
    assert weights(form="selection") == {"a": 0, "b": 0, "c": 1, "d": 0, "e": 0}


@pytest.mark.parametrize("form", ["mixture", "fusion"])
def test_a_mixture_has_one_kth_for_each_of_the_k_nearest_and_k_is_3_as_published(form):
    assert weights(form=form) == pytest.approx({"a": 0, "b": 1 / 3, "c": 1 / 3, "d": 1 / 3, "e": 0})
    assert weights(form=form, nearest=2) == {"a": 0, "b": 0.5, "c": 0.5, "d": 0, "e": 0}
    assert weights(form=form, nearest=1) == weights(form="selection")


def test_with_fewer_than_3_scores_a_mixture_takes_all_of_them():
    assert weights(form="mixture", scores={"e": 0.1, "a": 0.0}) == {"a": 0.5, "b": 0, "c": 0, "d": 0, "e": 0.5}


def test_of_equal_scores_the_one_named_first_is_nearer():
    assert weights(form="selection", scores={"d": 0.5, "a": 0.5})["d"] == 1
    assert weights(form="selection", scores={"a": 0.5, "d": 0.5})["a"] == 1


def test_fusion_of_the_same_weights_sums_the_factors_apart_and_a_mixture_the_updates():
    generator = torch.Generator().manual_seed(0)
    factors = [Factors(*(torch.randn(*s, generator=generator).double() for s in ((2, 7), (5, 2)))) for _ in range(2)]
    pool = ExpertPool([Adapter(name, "base", {"l": f}) for name, f in zip("ab", factors, strict=True)])
    mean_a, mean_b = sum(f.a_RI for f in factors) / 2, sum(f.b_OR for f in factors) / 2
    expected = {"fusion": mean_b @ mean_a, "mixture": sum(f.b_OR @ f.a_RI for f in factors) / 2}
    for form, delta in expected.items():
        solver = Similarity(pool.names, scores={"a": 0.4, "b": 0.3}, form=form)
        merged = merge(pool, solver.ask()[0].as_dict(), solver.merge_method)
        assert torch.allclose(merged.double(), delta, atol=1e-6)


def merge(pool, weights, method):
    import loraweave as lw

    return lw.merge([pool[name] for name in weights], list(weights.values()), method=method).delta("l")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "mixture", "nearest": 5}, "nearest is 5, but 4 experts have a score"),
        ({"form": "selection", "nearest": 2}, "nearest is 2, but a selection is of 1"),
        ({"scores": {}}, "no expert has a score"),
        ({"scores": {"a": math.nan}}, "the score of 'a' is nan"),
        ({"scores": {"a": math.inf}}, "the score of 'a' is inf"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(WeightingError, match=message):
        weights(**options)


def test_scores_of_other_experts_are_refused():
    with pytest.raises(UnknownExpert, match="'f'"):
        weights(scores={"f": 1.0})
