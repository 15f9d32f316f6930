"""Heads in a merge: never summed or dropped without a word."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraweave.composer.merge.merge import merge
from loraweave.errors import CompositionError, LayerMismatch, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

HEAD = "score.weight"


def adapter(name: str, seed: int, head: torch.Tensor | None = None) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = Factors(torch.randn(2, 7, generator=generator), torch.randn(5, 2, generator=generator))
    return Adapter(name, "tiny", {"q": factors}, heads={} if head is None else {HEAD: head})


ONES, TWOS = torch.ones(2, 5), torch.full((2, 5), 2.0)


def test_a_head_is_refused_by_name_unless_the_user_chooses() -> None:
    with pytest.raises(CompositionError, match=r"'score.weight' in 'b'.*heads='first'"):
        merge([adapter("a", 0), adapter("b", 1, ONES)], [1.0, 1.0])


def test_one_adapter_of_weight_one_keeps_its_head() -> None:
    a = adapter("a", 0, ONES)
    assert merge([a], [1.0]).hash == a.hash


def test_one_adapter_of_another_weight_needs_a_choice() -> None:
    with pytest.raises(CompositionError, match=HEAD):
        merge([adapter("a", 0, ONES)], [0.5])


def test_first_is_the_first_in_the_order_given() -> None:
    a, b = adapter("a", 0, ONES), adapter("b", 1, TWOS)
    assert torch.equal(merge([a, b], [1.0, 1.0], heads="first").heads[HEAD], ONES)
    assert torch.equal(merge([b, a], [1.0, 1.0], heads="first").heads[HEAD], TWOS)


def test_average_weighs_those_that_have_the_head() -> None:
    merged = merge([adapter("a", 0, ONES), adapter("b", 1, TWOS), adapter("c", 2)], [1.0, 3.0, 5.0], heads="average")
    assert torch.allclose(merged.heads[HEAD], torch.full((2, 5), 1.75))


def test_an_average_that_does_not_exist_is_refused() -> None:
    a, b = adapter("a", 0, ONES), adapter("b", 1, torch.ones(3, 5))
    with pytest.raises(LayerMismatch, match=r"\(2, 5\) in 'a' and \(3, 5\) in 'b'"):
        merge([a, b], [1.0, 1.0], heads="average")
    with pytest.raises(WeightingError, match="sum to 0"):
        merge([a, replace(b, heads={HEAD: TWOS})], [1.0, -1.0], heads="average")


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(WeightingError, match="heads='last'"):
        merge([adapter("a", 0)], [1.0], heads="last")


def test_the_recipe_says_what_was_chosen() -> None:
    merged = merge([adapter("a", 0, ONES), adapter("b", 1)], [1.0, 1.0], heads="first")
    assert merged.card["recipe"]["heads"] == "first"
