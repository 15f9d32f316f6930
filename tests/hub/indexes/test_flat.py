"""The index that is taken where none is named."""

from __future__ import annotations

import pytest

from loraweave import registry
from loraweave.hub.indexes import flat
from loraweave.hub.indexes.flat import Flat, index_choice

KINDS = {
    "flat": Flat,
    "few": type("Few", (Flat,), {"default_from": 5}),
    "many": type("Many", (Flat,), {"default_from": 100}),
    "named": type("Named", (Flat,), {}),
    "plain": type("Plain", (), {}),
}


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    monkeypatch.setattr(registry, "names", lambda folder: sorted(KINDS))
    monkeypatch.setattr(registry, "get", lambda folder, name: KINDS[name])
    monkeypatch.setattr(flat, "FEW_KEYS", 3)


@pytest.mark.parametrize(("count", "kind"), [(1, "flat"), (4, "flat"), (5, "few"), (99, "few"), (100, "many")])
def test_of_the_indexes_whose_number_the_keys_reach_the_one_with_the_largest_is_taken(count, kind):
    assert index_choice("auto")(count) is KINDS[kind]


@pytest.mark.parametrize("name", KINDS)
def test_a_named_index_is_taken_for_any_number_of_keys(name):
    assert {index_choice(name)(count) for count in (1, 10**6)} == {KINDS[name]}


def test_for_few_keys_no_index_is_looked_for(monkeypatch):
    monkeypatch.setattr(flat, "FEW_KEYS", 6)
    monkeypatch.setattr(registry, "names", lambda folder: pytest.fail("an index was looked for"))
    assert index_choice("auto")(5) is Flat
