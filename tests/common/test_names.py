import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraweave.common.names import checked_name, near_misses
from loraweave.errors import InvalidName


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "../x",
        "a/b",
        "C:\\x",
        "a.b.c",
        "model.layers.0",
        "a b",
        "🦜",
        "it's",
        '"',
        "100 %",
        "train",
        ".",
        "\u200fshalom",
        "x" * 200,
    ],
)
def test_free_text_is_a_name(name):
    assert checked_name(name) == name


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("", "at least one character"),
        ("x" * 201, "at most 200 characters, not 201"),
        ("x" * 10_000, "not 10000"),
        (" x", "neither begins nor ends with a space"),
        ("x\t", "neither begins nor ends"),
        ("   ", "neither begins nor ends"),
        ("a\0b", "U\\+0000"),
        ("a\nb", "character 2 of 'a\\\\nb' is U\\+000A"),
        ("a\x7fb", "U\\+007F"),
        ("a\u2028b", "U\\+2028"),
        ("a\ud800b", "U\\+D800"),
        (None, "not NoneType"),
        (b"x", "not bytes"),
    ],
)
def test_a_name_that_breaks_a_rule_is_refused_with_the_rule(name, rule):
    with pytest.raises(InvalidName, match=rule):
        checked_name(name)


def test_two_unicode_forms_of_one_name_are_one_name():
    assert checked_name("cafe\u0301") == checked_name("caf\u00e9") == "caf\u00e9"


def test_names_that_differ_by_case_differ():
    assert checked_name("Qa") != checked_name("qa")


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(InvalidName) as caught:
        checked_name("y" * 5_000)
    assert len(str(caught.value)) < 200


@given(st.text(max_size=250))
def test_any_text_is_stored_in_a_printable_form_or_refused(text):
    try:
        name = checked_name(text)
    except InvalidName as error:
        str(error).encode("utf-8")
    else:
        assert checked_name(name) == name
        assert name.encode("utf-8")
        assert len(name.splitlines()) == 1


def test_near_misses_are_the_nearest_first_and_see_through_case():
    assert near_misses("SENTIMENT", ["sentiment-en", "sentiment", "sql", "Sentiment"])[:2] == ["sentiment", "Sentiment"]
    assert near_misses("zzz", ["sentiment", "sql"]) == []
