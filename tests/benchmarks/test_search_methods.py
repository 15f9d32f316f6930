"""What retrieval is compared with, against formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

import loraweave as lw
from benchmarks import _search_methods as methods
from loraweave.hub.embedders.hashing import Hashing


@pytest.fixture
def tasks():
    make = methods.PoolTask
    return [
        make("one", "red red blue", (("green", "x"),), (), ()),
        make("two", "blue", (), (), ()),
        make("three", "yellow blue", (("pink", "y"),), (), ()),
    ]


def test_bm25_is_okapis_formula(tasks):
    found = methods.bm25(tasks)(methods.Ask(("red blue",)))
    documents = [["green", "red", "red", "blue"], ["blue"], ["pink", "yellow", "blue"]]
    mean_length = 8 / 3
    expected = []
    for words in documents:
        score = 0.0
        for word, holding in (("red", 1), ("blue", 3)):
            idf = math.log(1 + (3 - holding + 0.5) / (holding + 0.5))
            count = words.count(word)
            score += idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(words) / mean_length))
        expected.append(score)
    np.testing.assert_allclose(found, expected)


def test_a_search_by_examples_uses_the_outputs_of_the_cards():
    tasks = [
        methods.PoolTask("upper", "", (("cat", "CAT"), ("dog", "DOG")), (), ()),
        methods.PoolTask("spell", "", (("cat", "c a t"), ("dog", "d o g")), (), ()),
    ]
    with methods.card_hub(tasks) as hub:
        score = methods.searched(hub, methods.Remembering(Hashing(), ["cow"]), examples=True)
        for output, best in (("COW", 0), ("c o w", 1)):
            assert int(np.argmax(score(methods.Ask(("cow",), (output,))))) == best


def test_foresight_is_the_rank_correlation_with_the_gains_and_what_the_first_bring(tasks):
    unseen = [methods.UnseenTask("new", "", tuple((str(n), "y") for n in range(10)), ())]
    measured = {"tasks": {"new": {"gains": {"one": 1.0, "two": 3.0, "three": 2.0}}}}
    scorers = {"reversed": lambda ask: np.array([3.0, 1.0, 2.0]), "half": lambda ask: np.array([1.0, 2.0, 3.0])}
    found = methods.foresight(tasks, unseen, scorers, measured, 0)["5 inputs"]
    assert (found["reversed"]["spearman"], found["reversed"]["first"], found["reversed"]["best_of_5"]) == (-1.0, 1.0, 3.0)
    assert found["half"]["spearman"] == pytest.approx(0.5)
    assert found["oracle"]["first"] == 3.0


def test_a_missing_adapter_is_not_searched_and_the_others_are():
    tasks = [
        methods.PoolTask("sums", "", (("1 + 2", "3"),), (("1 + 2", "3"),), ()),
        methods.PoolTask("films", "", (("A dull film.", "bad"),), (("A dull film.", "bad"),), ()),
    ]
    with methods.card_hub(tasks) as hub:
        retriever = lw.Retriever(hub, embedder="hashing", keys=())
        there, gone = methods.missing(retriever, tasks, sizes=(1,))[1]
        assert [scores[0] for scores in there] == pytest.approx([1.0, 1.0], abs=1e-6)
        # each is then found by its likeness to the other
        (likeness,) = {round(float(np.prod(Hashing().embed(["1 + 2", "A dull film."]), axis=0).sum()), 5)}
        assert [scores[0] for scores in gone] == pytest.approx([likeness] * 2, abs=1e-5)
