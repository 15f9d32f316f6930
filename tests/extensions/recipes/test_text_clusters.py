"""How many experts texts ask for."""

import pytest

from loraweave.errors import WeightingError
from loraweave.extensions.recipes import experts_for

TEXTS = [
    *(f"the {planet} turns around the sun in its orbit" for planet in ("earth", "moon", "mars", "venus")),
    *(f"fry {food} with butter and salt" for food in ("eggs", "onions", "fish", "beans", "rice")),
    *(f"goalkeeper {name} saved every penalty kick" for name in ("Ann", "Bo", "Cy", "Di")),
]


def test_texts_of_three_subjects_ask_for_three_experts_in_any_order():
    assert experts_for(TEXTS) == 3
    assert experts_for(TEXTS[::-1] + TEXTS[:4]) == 3


@pytest.mark.parametrize("texts", [(), ("one", "one", "two"), ("!", "?", "...", ";")])
def test_texts_that_are_too_few_to_differ_ask_for_one(texts):
    assert experts_for(texts) == 1


def test_no_more_experts_are_asked_for_than_may_be():
    assert experts_for(TEXTS, most=2) == 2
    with pytest.raises(WeightingError, match="most is 1: it is the largest number"):
        experts_for(TEXTS, most=1)


def test_of_many_texts_a_part_is_looked_at_that_the_seed_determines(monkeypatch):
    monkeypatch.setattr("loraweave.extensions.recipes.cluster_gates.MOST_TEXTS", 11)
    assert experts_for(TEXTS, seed=1) == experts_for(TEXTS[::-1], seed=1) == 3
