"""How far two answers are apart, by numbers that are worked out here."""

import pytest

from loraweave.serving.verify.answers import Answer, distance, top_of

KNOWN = Answer(
    "ab",
    ("a", "b", "</s>"),
    ({"a": -0.5, "b": -1.0, "c": -3.0}, {"b": -0.1, "a": -2.5}, {"</s>": -0.2, "a": -1.9}),
    end="</s>",
    ended=True,
)


def test_log_probabilities_are_compared_by_their_root_mean_square_as_far_as_the_texts_agree():
    served = Answer("ac", ("a", "c"), ({"a": -0.8, "b": -0.6}, {"b": -0.1, "c": -3.0}))
    # 0.3 and 0.4 of the first token, 0 of b in the second, c is below what is known there; c in place of b costs 2.4
    assert distance(served, KNOWN) == pytest.approx(((0.09 + 0.16 + 0 + 2.4**2) / 4) ** 0.5)


def test_a_token_that_is_not_among_the_known_has_at_most_their_least():
    served = Answer("d", ("a",), ({"d": -1.0},))
    assert distance(served, KNOWN) == pytest.approx(2.0)


def test_an_end_that_an_engine_writes_without_text_is_no_difference():
    tops = ({"a": -0.5, "b": -1.0}, {"b": -0.1}, {"a": -1.9})
    assert distance(Answer("ab", ("a", "b", ""), tops, ended=True), KNOWN) == pytest.approx(0.0)
    assert distance(Answer("aba", ("a", "b", "a"), tops), KNOWN) == pytest.approx((1.7**2 / 5) ** 0.5)


def test_texts_are_apart_by_what_the_known_model_prefers_its_own_word_by():
    assert distance(Answer("ab", ended=True), KNOWN) == 0.0
    assert distance(Answer("a"), KNOWN) == 0.0
    assert distance(Answer("a", ended=True), KNOWN) == pytest.approx(2.4)
    assert distance(Answer("bb"), KNOWN) == pytest.approx(0.5)
    assert distance(Answer("zz"), KNOWN) == pytest.approx(2.5)


def test_of_tokens_that_are_the_same_text_the_likeliest_counts_and_spaces_before_it_do_not():
    assert top_of([("a", -2.0), (" a", -1.0), ("", -0.1), ("b", -3.0)]) == {"a": -1.0, "b": -3.0}
