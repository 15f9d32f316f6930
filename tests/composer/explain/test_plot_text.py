"""Texts in pictures: what the fonts have stays, what they lack is told apart, and long ones lose their middle."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from loraweave.composer.explain.plot import Glyphs, width


@pytest.fixture
def own_font_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import font_manager

    monkeypatch.setattr(font_manager, "fontManager", SimpleNamespace(ttflist=[]))
    monkeypatch.setattr(font_manager, "findfont", font_manager.FontManager().findfont)


@pytest.mark.parametrize("text", ["plain", "Отрицание", "άρνηση", "$x_1$ <b>&", "n̈"])
def test_what_the_font_has_is_shown_as_it_is(text: str) -> None:
    assert Glyphs([text]).show(text, 40) == text


def test_characters_of_no_font_become_their_numbers(own_font_only: None) -> None:
    glyphs = Glyphs(["情", "感"])
    assert (glyphs.show("情", 40), glyphs.show("感", 40)) == (r"\u60c5", r"\u611f")


def test_a_font_that_has_the_characters_is_asked_for_them() -> None:
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    own = set(FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap())
    font = next(each for each in font_manager.fontManager.ttflist if each.name == "STIXGeneral")
    odd = next(chr(code) for code in FT2Font(font.fname).get_charmap() if code not in own and chr(code).isprintable())
    glyphs = Glyphs([f"a{odd}"])
    assert len(glyphs.families) == 2
    assert glyphs.show(f"a{odd}", 40) == f"a{odd}"


def test_control_characters_and_line_breaks_are_made_visible() -> None:
    assert Glyphs([""]).show("a\nb\tc\x1b", 40) == r"a↵b⇥c\x1b"


def test_long_texts_lose_their_middle() -> None:
    assert Glyphs(["abcdefghij"]).show("abcdefghij", 10) == "abcdefghij"
    assert Glyphs(["abcdefghijk"]).show("abcdefghijk", 6) == "abc…jk"


def test_wide_characters_count_twice_and_combining_ones_not() -> None:
    assert (width("ab"), width("情感"), width("é")) == (2, 4, 1)
