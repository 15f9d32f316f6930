"""AdapterSoup: which adapters are averaged, by cosines written out, and by topics that share no word."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import loraweave as lw
from loraweave.errors import UnknownExpert, WeightingError
from loraweave.extensions.routers.routers.adapter_soup import AdapterSoup
from loraweave.hub.embedders.hashing import Hashing

TEXTS = {
    "fruit": ["red apple", "green apple", "an apple and a pear"],
    "more fruit": ["a pear and an apple", "red apple"],
    "numbers": ["one two three", "three two", "two and one"],
    "places": ["rome in italy", "paris in france"],
}
ASKED = ["a red apple", "two apple", "pear"]


def soup(**options):
    given = {"texts": TEXTS, "asked": ASKED, "embedder": "hashing"} | options
    found = AdapterSoup(tuple(given["texts"]), **given).ask()[0].as_dict()
    return {name: weight for name, weight in found.items() if weight}


def mean_cosines(asked=ASKED):
    embed = Hashing().embed
    return {
        name: float(np.mean([[v @ u / np.linalg.norm(v) / np.linalg.norm(u) for u in embed(own)] for v in embed(asked)]))
        for name, own in TEXTS.items()
    }


@pytest.mark.parametrize(("most", "least"), [(5, 0.15), (1, 0.0), (2, 0.0), (4, 0.05), (5, 0.999)])
def test_the_adapters_of_the_largest_mean_cosine_share_1_alike(most, least):
    cosines = mean_cosines()
    order = sorted(cosines, key=lambda name: -cosines[name])
    chosen = [name for name in order if cosines[name] > least][:most] or order[:1]
    assert soup(most=most, least=least) == pytest.approx(dict.fromkeys(chosen, 1 / len(chosen)))


def test_the_adapters_whose_texts_lie_in_a_cluster_of_the_inputs_are_averaged():
    # two topics with no word in common, of two adapters each
    texts = {
        "a": ["red apple", "green apple", "red green apple"],
        "b": ["apple red", "apple green", "green red apple"],
        "c": ["one two", "two three", "one three two"],
        "d": ["two one", "three two", "three one two"],
    }
    for asked, topic in ((["green apple", "red apple"], "ab"), (["one two three"], "cd")):
        assert soup(texts=texts, asked=asked, form="clusters", embedder="hashing").keys() <= set(topic)
    both = soup(texts=texts, asked=["green apple", "red apple", "one two three"], form="clusters", share=0.4)
    assert both.keys() <= set("ab")
    assert sum(both.values()) == pytest.approx(1.0)


def test_compose_takes_the_texts_from_the_cards_and_merges_as_it_is_told(model, tokenizer, pool):
    shown = lw.ExpertPool(
        [replace(a, card={"examples": own}) for a, own in zip(pool.adapters.values(), TEXTS.values(), strict=False)]
    )
    task = lw.Task([("a red apple", "b"), ("pear", "c")])
    options = {"method": "adapter_soup", "embedder": "hashing", "least": 0.0, "most": 2, "progress": False}
    found = lw.compose(model, tokenizer, shown, task, folds=0, **options)
    expected = soup(
        texts=dict(zip(shown.names, TEXTS.values(), strict=False)), asked=["a red apple", "pear"], least=0.0, most=2
    )
    assert {name: weight for name, weight in found.weights.items() if weight} == pytest.approx(expected)


def test_what_has_no_text_is_refused_by_name():
    with pytest.raises(WeightingError, match=r"none of 'numbers', 'places': give their cards"):
        soup(texts=TEXTS | {"numbers": [], "places": []})
    with pytest.raises(WeightingError, match="needs inputs of the task"):
        soup(asked=[])
    with pytest.raises(WeightingError, match="most=0"):
        soup(most=0)
    with pytest.raises(UnknownExpert, match="'nuts'"):
        AdapterSoup(("fruit",), texts={"nuts": ["a"], "fruit": ["b"]}, asked=["a"], embedder="hashing").ask()
