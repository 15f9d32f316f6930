"""Searches by texts that nobody expects, and of empty hubs: defined for every index and every key that reads texts."""

import math

import pytest
import torch

from loraweave import registry
from loraweave.errors import RetrievalError
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.retrieval.retriever import Retriever
from loraweave.types import Factors

TEXTS = {
    "ten megabytes": "is this review positive? " * 400_000,
    "one word of ten megabytes": "x" * 10_000_000,
    "control characters": "".join(map(chr, range(1, 32))) + "a\x7f\x00",
    "a lone surrogate": "a \ud83d b",
    "right to left": "\u202eמה הבירה של צרפת؟ ما عاصمة فرنسا",
    "Chinese, Japanese, Thai": "法国的首都是什么 フランスの首都はどこですか เมืองหลวงของฝรั่งเศสคืออะไร",
    "emoji and combining marks": "🦜👩‍👩‍👧 e" + "\u0301" * 5_000,
    "quotes and statements": "'; DROP TABLE adapters; -- \" % _ \\",
    "one letter": "a",
}
# the key of an adapter's weights reads no text
TEXT_KEYS = sorted(set(registry.names("keys")) - {"spectral"})


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        for number, text in enumerate(["is this film good?", "12 + 30", "法国的首都"]):
            layers = {"layer": Factors(torch.ones(1, 3), torch.full((2, 1), 1.0 + number))}
            outputs = {"outputs": [f"yes {number}", f"no {number}"]}
            adapter = Adapter(f"adapter {number}", "base", layers, card=outputs)
            hub.add(adapter, description=text, examples=[text, f"{text} {number}"])
        yield hub


def require_ranked(candidates, count):
    scores = [candidate.score for candidate in candidates]
    assert len(candidates) == count
    assert all(math.isfinite(score) for score in scores)
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("index", registry.names("indexes"))
def test_every_text_ranks_all_adapters_and_the_same_twice(hub, index):
    retriever = Retriever(hub, embedder="hashing", index=index)
    found = retriever.candidates(list(TEXTS.values()), k=100)
    for candidates in found:
        require_ranked(candidates, 3)
        assert all(len(candidate.evidence) < 500 for candidate in candidates)
    again = retriever.candidates(list(TEXTS.values()), k=100)
    assert [[c.name for c in candidates] for candidates in again] == [[c.name for c in candidates] for candidates in found]


@pytest.mark.parametrize("key", TEXT_KEYS)
def test_every_key_of_texts_ranks_all_adapters_for_every_text(hub, key):
    retriever = Retriever(hub, embedder="hashing", keys=[key])
    for text in TEXTS.values():
        require_ranked(retriever.for_examples([(text, text)], description=text, k=100), 3)


@pytest.mark.parametrize("index", registry.names("indexes"))
def test_an_empty_hub_finds_nothing_by_any_index(tmp_path, index):
    with Hub(tmp_path) as empty:
        retriever = Retriever(empty, embedder="hashing", index=index)
        assert retriever.candidates("a", k=5) == []
        assert retriever.candidates(list(TEXTS.values()), k=5) == [[] for _ in TEXTS]
        assert retriever.for_examples([("a", "b")], k=5) == []


@pytest.mark.parametrize("text", ["", " \n\t", "\u3000"])
def test_a_text_without_a_visible_character_is_refused_by_every_kind_of_search(hub, text):
    retriever = Retriever(hub, embedder="hashing")
    for search in (retriever.candidates, lambda given: retriever.for_task([given])):
        with pytest.raises(RetrievalError, match="is empty"):
            search(text)
