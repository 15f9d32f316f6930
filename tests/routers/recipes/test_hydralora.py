"""One a for all experts, and how many experts texts ask for."""

import pytest
import torch

import loraweave as lw
from loraweave.errors import WeightingError
from loraweave.routers.recipes.hydralora import Hydralora

LAYER = "model.layers.1.mlp.down_proj"
TEXTS = [
    *(f"the {planet} turns around the sun in its orbit" for planet in ("earth", "moon", "mars", "venus")),
    *(f"fry {food} with butter and salt" for food in ("eggs", "onions", "fish", "beans", "rice")),
    *(f"goalkeeper {name} saved every penalty kick" for name in ("Ann", "Bo", "Cy", "Di")),
]


def test_a_site_learns_one_a_and_a_b_of_each_expert(make_model):
    with lw.experts("hydralora", make_model("llama"), num_experts=3, rank=2, target_modules=(LAYER,)) as made:
        (layer,), (site,) = made.layers.values(), made.sites.values()
        assert layer.a_SI.shape == (2, site.num_inputs)
        assert layer.b_SO.shape == (3 * 2, site.num_outputs)


def test_it_adds_no_loss(terms_of):
    assert terms_of("hydralora", {"input_ids": torch.tensor([[3, 9, 27]])})[0] == {}


def test_texts_of_three_subjects_ask_for_three_experts_in_any_order():
    assert Hydralora.experts_for(TEXTS) == 3
    assert Hydralora.experts_for(TEXTS[::-1] + TEXTS[:4]) == 3


@pytest.mark.parametrize("texts", [(), ("one", "one", "two"), ("!", "?", "...", ";")])
def test_texts_that_are_too_few_to_differ_ask_for_one(texts):
    assert Hydralora.experts_for(texts) == 1


def test_no_more_experts_are_asked_for_than_may_be():
    assert Hydralora.experts_for(TEXTS, most=2) == 2
    with pytest.raises(WeightingError, match="most is 1: it is the largest number"):
        Hydralora.experts_for(TEXTS, most=1)


def test_of_many_texts_a_part_is_looked_at_that_the_seed_determines(monkeypatch):
    monkeypatch.setattr("loraweave.routers.recipes.hydralora.MOST_TEXTS", 11)
    assert Hydralora.experts_for(TEXTS, seed=1) == Hydralora.experts_for(TEXTS[::-1], seed=1) == 3
