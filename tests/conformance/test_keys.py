"""What every key promises; a new file in retrieval/keys is tested from the moment it exists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from properties import Properties

from loraweave import registry
from loraweave.extend.hubs import KeySpace, Query
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.hub.search.search import SearchIndex
from loraweave.types import Factors

PROPERTIES = Properties(registry.names("keys"))


def adapter(name, seed, **card):
    torch.manual_seed(seed)
    layers = {f"layers.{n}": Factors(torch.randn(2, 5), torch.randn(7, 2)) for n in range(2)}
    return Adapter(name, "base", layers, card=card)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        texts = {"sums": ["12 + 30", "7 + 1"], "upper": ["horse", "the cat"], "mix": ["house, dog", "x", "A long text."]}
        for seed, (name, inputs) in enumerate(texts.items()):
            card = {"outputs": [text.upper() for text in inputs]}
            hub.add(adapter(name, seed, **card), examples=inputs, description=f"does {name}")
        # no texts, and a card with nonsense where others have texts
        hub.add(adapter("bare", 9, outputs="none"))
        yield hub


@pytest.fixture(scope="module")
def space(hub):
    return KeySpace(hub, SearchIndex(hub, embedder="hashing"))


@PROPERTIES.given
def key(name):
    return name, registry.get("keys", name)()


@pytest.fixture(scope="module")
def query():
    return Query(("5 + 5", "horse"), ("10", "HORSE"), "adds numbers", adapter("query", 4))


@pytest.mark.parametrize("name", PROPERTIES.entries)
def test_a_key_keeps_all_properties(name, request, query, hub, space):
    PROPERTIES.walk(request, name, query=query, hub=hub, space=space)


@PROPERTIES.add()
def scores_are_one_number_from_minus_one_to_one_for_each_record_or_nan(key, query, hub, space):
    scores_N = key[1].scores(query, hub.records(), space)
    assert scores_N.shape == (4,)
    known_N = scores_N[~np.isnan(scores_N)]
    assert len(known_N) >= 3
    assert (np.abs(known_N) <= 1 + 1e-6).all()
    # it tells the adapters apart
    assert np.ptp(known_N) > 1e-3


@PROPERTIES.add()
def a_query_that_lacks_everything_gets_no_opinion(key, hub, space):
    assert np.isnan(key[1].scores(Query(), hub.records(), space)).all()


@PROPERTIES.add()
def no_records_give_no_scores(key, query, space):
    assert key[1].scores(query, [], space).shape == (0,)


@PROPERTIES.add()
def the_order_of_the_records_does_not_matter(key, query, hub, space):
    records = hub.records()
    forward_N, backward_N = (key[1].scores(query, some, space) for some in (records, records[::-1]))
    np.testing.assert_allclose(backward_N[::-1], forward_N, atol=1e-9)


@PROPERTIES.add()
def a_score_does_not_depend_on_the_other_records(key, query, hub, space):
    if "relative" in registry.traits_of(type(key[1])):
        pytest.skip("compares adapters with each other")
    records = hub.records()
    alone_N = [key[1].scores(query, [record], space)[0] for record in records]
    np.testing.assert_allclose(alone_N, key[1].scores(query, records, space), atol=1e-9)


@PROPERTIES.add()
def a_second_call_gives_the_same(key, query, hub, space):
    first_N, second_N = (key[1].scores(query, hub.records(), space) for _ in range(2))
    np.testing.assert_array_equal(first_N, second_N)
