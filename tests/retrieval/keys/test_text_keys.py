"""The keys that compare texts, on texts that are angles: every number follows from a cosine."""

from __future__ import annotations

import numpy as np
import pytest

from loraweave.retrieval.keys.description import Description
from loraweave.retrieval.keys.mean import Mean
from loraweave.retrieval.keys.outputs import Outputs
from loraweave.retrieval.keys.relation import Relation, relation_of
from loraweave.retrieval.query import Query


def test_mean_is_the_cosine_between_the_two_means(score, cosine):
    assert score(Mean(), Query(("20", "60")), "0", "30") == cosine(25)


def test_description_compares_with_the_description_and_without_one_with_the_examples(score, cosine):
    assert score(Description(), Query(("90",), (), "30"), description="10") == cosine(20)
    assert score(Description(), Query(("20",), ("60",)), description="10") == cosine(30)
    assert np.isnan(score(Description(), Query(("20",)), "20"))


def test_outputs_are_compared_where_the_card_has_one_for_each_example(score, cosine):
    query = Query(("0",), ("20",))
    assert score(Outputs(), query, "0", "0", outputs=["30", "50"]) == cosine(20)
    for outputs in (["30"], "30", None, [1, 2]):
        assert np.isnan(score(Outputs(), query, "0", "0", outputs=outputs))


def test_a_relation_tells_copies_capitals_and_spellings_apart(score):
    upper, spelled = Query(("horse",), ("HORSE",)), Query(("horse",), ("h o r s e",))
    for query in (upper, spelled):
        own = score(Relation(), query, "cat", outputs=["CAT" if query is upper else "c a t"])
        other = score(Relation(), query, "cat", outputs=["c a t" if query is upper else "CAT"])
        assert own > other + 0.2
    assert np.linalg.norm(relation_of("a", "b")) == pytest.approx(1.0)
