"""The picture: what its maps show, that no text is on another, and that names of any kind are only names."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraweave.extensions.explain.explanation import Explanation
from loraweave.extensions.explain.plot import Glyphs, draw, width

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
NAMES = ["a" * 100, "b" * 50 + "$x_1$", "$\\frac{1$", "<b>bold</b>", "情感分析", "Отрицание", "النفي", "{} % # &", "n\nl"]
WORDS = ("The", " committee", ",", " which", " had", "\n", " met", "   ", "$", "的", "!", "!")


def make(num_tokens: int, num_blocks: int, num_experts: int, *, signed: bool = False) -> Explanation:
    tokens = tuple(itertools.islice(itertools.cycle(WORDS), num_tokens))
    layers = tuple(f"model.layers.{block}.{kind}" for block in range(num_blocks) for kind in KINDS)
    names = tuple(NAMES[:num_experts] + [f"expert {at}" for at in range(len(NAMES), num_experts)])
    w_TLE = torch.rand(num_tokens, len(layers), num_experts)
    return Explanation(tokens, layers, names, w_TLE - 0.4 if signed else w_TLE)


def texts_of(figure: Any) -> list[Any]:
    """The texts that are drawn; a figure also has those of ticks beyond the ends of an axis, which are not."""
    from matplotlib.text import Text

    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        original = Text.draw
        patch.setattr(Text, "draw", lambda text, renderer: (drawn.append(text), original(text, renderer)))
        figure.draw_without_rendering()
    return [each for each in dict.fromkeys(drawn) if each.get_visible() and each.get_text().strip()]


def axes_of(figure: Any) -> list[Any]:
    return [axes for axes in figure.findobj(lambda each: hasattr(each, "get_images")) if axes.get_images()]


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks", "num_experts"),
    [(1, 1, 1), (9, 1, 2), (12, 5, 9), (40, 30, 20), (48, 6, 20), (200, 30, 20), (30, 80, 60)],
)
def test_no_text_lies_on_another_or_outside(num_tokens: int, num_blocks: int, num_experts: int) -> None:
    figure = draw(make(num_tokens, num_blocks, num_experts))
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure)]
    width, height = figure.canvas.get_width_height()
    outside = [text for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]
    # a glyph's box reaches a little beyond its ink
    shrunk = [(text, box.padded(-0.15 * min(box.width, box.height))) for text, box in boxes]
    overlapping = [(a[0], b[0]) for a, b in itertools.combinations(shrunk, 2) if a[1].overlaps(b[1])]
    assert outside == []
    assert overlapping == []


def test_every_axis_says_what_it_is() -> None:
    figure = draw(make(12, 30, 20))
    maps = axes_of(figure)
    assert [axes.get_xlabel() for axes in maps] == ["block of model.layers (mean of its layers)", "kind of layer", "token"]
    assert maps[0].get_ylabel() == maps[2].get_ylabel() == "expert"
    bars = [each for each in figure.findobj(lambda each: hasattr(each, "get_ylabel")) if each.get_ylabel() == "mean weight"]
    assert len(bars) == 2


def test_the_maps_show_the_means() -> None:
    explanation = make(12, 30, 20)
    by_block, by_kind, by_token = (axes.get_images()[0].get_array() for axes in axes_of(draw(explanation)))
    w_TBKE = explanation.w_TLE.reshape(12, 30, len(KINDS), 20)
    assert torch.allclose(torch.tensor(by_block), w_TBKE.mean(dim=(0, 2)).T, atol=1e-6)
    assert torch.allclose(torch.tensor(by_kind), w_TBKE.mean(dim=(0, 1)).T, atol=1e-6)
    assert torch.allclose(torch.tensor(by_token), explanation.w_TLE.mean(dim=1).T, atol=1e-6)


def test_few_layers_are_shown_one_by_one() -> None:
    first, _ = axes_of(draw(make(3, 2, 2)))
    assert [label.get_text() for label in first.get_xticklabels()] == [
        f"{block}.{kind}" for block in (0, 1) for kind in KINDS
    ]


def test_of_many_experts_the_largest_shares_are_shown_and_counted() -> None:
    w_TLE = torch.ones(2, 2, 100)
    w_TLE[..., 10:40] = 9.0
    first, _ = axes_of(draw(Explanation(("x", "y"), ("p.0", "p.1"), tuple(map(str, range(100))), w_TLE)))
    assert [label.get_text() for label in first.get_yticklabels()] == [str(at) for at in range(10, 40)]
    assert first.get_ylabel() == f"expert (the 30 with {270 / 340:.0%} of the weight, of 100)"


def test_negative_weights_have_colours_on_both_sides_of_zero() -> None:
    for signed in (True, False):
        [image] = axes_of(draw(make(3, 2, 2, signed=signed)))[0].get_images()
        low, high = image.get_clim()
        assert low == (-high if signed else 0.0)


def test_the_strip_names_each_tokens_strongest_expert() -> None:
    w_TLE = torch.tensor([[0.9, 0.1, 0.0], [0.2, -0.7, 0.1], [0.0, 0.0, 0.0], [0.0, 0.0, 3.0]])[:, None]
    figure = draw(Explanation(("one", " two", " three", " four"), ("p",), ("a", "b", "c"), w_TLE))
    strip = next(each for each in figure.findobj(lambda each: hasattr(each, "get_images")) if not each.axison)
    assert [text.get_text() for text in strip.texts][1:] == ["0", "1", "one", "2", " two", " three", "3", " four"]


def test_a_long_text_is_cut_and_says_so() -> None:
    said = [text.get_text() for text in texts_of(draw(make(2000, 1, 2))) if "of 2,000 tokens" in text.get_text()]
    assert len(said) == 1


def test_effects_stand_behind_the_experts_names() -> None:
    explanation = make(3, 2, 2).with_effects({NAMES[1]: -0.0625})
    first, _ = axes_of(draw(explanation))
    names = [label.get_text() for label in first.get_yticklabels()]
    assert [name.endswith("  -0.062") for name in names] == [False, True]
    assert first.get_ylabel() == "expert, rise of the loss without it"


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
    # its bold and italic files have other characters
    regular = FT2Font(font_manager.findfont("STIXGeneral"))
    odd = next(chr(code) for code in regular.get_charmap() if code not in own and chr(code).isprintable())
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
