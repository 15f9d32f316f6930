"""Outputs beside sample inputs: given, kept, and gone with the inputs they belong to."""

from __future__ import annotations

import pytest
import tiny_hubs

from loraweave.errors import AdapterUnsupported, InvalidTask

PAIRS = [("horse", "horses"), ("child", "children")]


def adapter(**card):
    return tiny_hubs.adapter(0, "plural", card=card)


def test_pairs_become_sample_inputs_with_an_output_each(hub):
    hub.add(adapter(), examples=PAIRS)
    record = hub.record("plural")
    assert record.examples == ("horse", "child")
    assert record.card["outputs"] == ["horses", "children"]


def test_outputs_of_the_card_stay_with_its_own_examples(hub):
    card = {"examples": ["horse", "child"], "outputs": ["horses", "children"]}
    assert hub.add(adapter(**card)).card["outputs"] == ["horses", "children"]


@pytest.mark.parametrize(("examples", "kept"), [(["horse", "child"], True), (["horse"], False), ([], False)])
def test_outputs_of_a_card_without_examples_belong_to_as_many_that_are_given(hub, examples, kept):
    assert ("outputs" in hub.add(adapter(outputs=["horses", "children"]), examples=examples).card) == kept


def test_other_examples_of_the_same_number_do_not_take_over_the_outputs_of_the_card(hub):
    card = {"examples": ["horse", "child"], "outputs": ["horses", "children"]}
    assert "outputs" not in hub.add(adapter(**card), examples=["ox", "foot"]).card


def test_an_update_of_the_examples_drops_their_outputs_and_another_update_keeps_them(hub):
    hub.add(adapter(), examples=PAIRS)
    hub.update("plural", tags=["words"])
    assert hub.record("plural").card["outputs"] == ["horses", "children"]
    hub.update("plural", examples=["ox", "foot"])
    assert "outputs" not in hub.record("plural").card
    hub.update("plural", examples=[("ox", "oxen")])
    assert (hub.record("plural").examples, hub.record("plural").card["outputs"]) == (("ox",), ["oxen"])


@pytest.mark.parametrize(
    ("examples", "error", "words"),
    [
        ([("horse", "horses"), "child"], AdapterUnsupported, r"1 of the 2 examples .* 'child'"),
        ([("horse", 3)], InvalidTask, r"example 1 of adapter 'plural' is \('horse', 3\), not a text, nor a pair"),
        ([("horse", "x" * 10_001)], AdapterUnsupported, r"examples\[0\] .* 10,001 bytes"),
    ],
)
def test_a_mixture_and_an_output_that_is_no_text_are_refused_before_anything_is_stored(hub, examples, error, words):
    with pytest.raises(error, match=words):
        hub.add(adapter(), examples=examples)
    assert len(hub) == 0
