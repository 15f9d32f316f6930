"""The page: every weight is in it to the last bit, names of any kind are only text, and it asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loraweave.errors import CompositionError, UnknownExpert
from loraweave.extensions.explain.explanation import Explanation
from loraweave.extensions.explain.figures import OTHER, PALETTE
from loraweave.extensions.explain.plot import draw

HOSTILE = "</script><script>alert(1)</script>"
NAMES = (
    HOSTILE,
    "النفي",
    "<img src=x onerror=alert(1)>",
    '"&amp;\\u2028\u2028',
    "情感\N{RIGHT-TO-LEFT OVERRIDE}x",
    "<!--",
    "a",
    "b",
    "c",
)
TOKENS = (HOSTILE, " النفي", "\n", "&lt;", "<!--", "$data", "   ", "的", "\x00", "]]>")


def make(num_tokens: int, num_blocks: int, num_experts: int, *, top_k: int | None = None) -> Explanation:
    tokens = tuple(itertools.islice(itertools.cycle(TOKENS), num_tokens))
    layers = tuple(f"model.layers.{block}.{kind}" for block in range(num_blocks) for kind in ("q", HOSTILE))
    names = tuple(NAMES[:num_experts] + tuple(f"expert {at}" for at in range(len(NAMES), num_experts)))
    w_TLE = torch.randn(num_tokens, len(layers), num_experts, generator=torch.Generator().manual_seed(0))
    if top_k is not None:
        best = w_TLE.topk(top_k, dim=-1)
        w_TLE = torch.zeros_like(w_TLE).scatter(-1, best.indices, best.values)
    return Explanation(tokens, layers, names, w_TLE)


class Parsed(HTMLParser):
    """The elements of a page with their attributes, and the text inside each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open][-1] += data

    @property
    def data(self) -> Any:
        return json.loads(self.texts["script"][0])

    def weights(self) -> np.ndarray:
        found = self.data
        shape = [len(found[name]) for name in ("tokens", "layers", "experts")]
        values, places = found["weights"]["values"], found["weights"]["places"]
        known = np.frombuffer(base64.b64decode(values), dtype="<f4")
        if places is None:
            return known.reshape(shape)
        w_N = np.zeros(int(np.prod(shape)), dtype="<f4")
        w_N[np.frombuffer(base64.b64decode(places), dtype="<i4")] = known
        return w_N.reshape(shape)


def parsed(explanation: Explanation, folder: Path) -> Parsed:
    return Parsed(explanation.page(folder / "page.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("top_k", [None, 2])
def test_every_weight_is_in_the_page_to_the_last_bit(top_k: int | None, tmp_path: Path) -> None:
    explanation = make(7, 3, 9, top_k=top_k)
    explanation.w_TLE[2, 1] = torch.nan
    page = parsed(explanation, tmp_path)
    assert (page.data["weights"]["places"] is None) == (top_k is None)
    assert np.array_equal(page.weights(), explanation.w_TLE.numpy(), equal_nan=True)


def test_names_and_tokens_are_text_and_nothing_else(tmp_path: Path) -> None:
    hostile, plain = make(20, 2, 9), make(20, 2, 9)
    tame = Explanation(("x",) * 20, ("l.0.a", "l.0.b", "l.1.a", "l.1.b"), tuple("abcdefghi"), plain.w_TLE)
    pages = [parsed(explanation, tmp_path) for explanation in (hostile, tame)]
    kinds = [[(tag, sorted(attributes)) for tag, attributes in page.elements] for page in pages]
    assert kinds[0] == kinds[1]
    assert pages[0].data["experts"] == list(hostile.experts)
    assert pages[0].data["tokens"] == list(hostile.tokens)
    assert pages[0].data["layers"] == list(hostile.layers)
    # readers without scripts get the text too
    shown = [text for text in pages[0].texts["bdi"] if text]
    assert shown == [token.replace("\n", "↵") for token in hostile.tokens]


def test_the_page_asks_nobody_for_anything_and_runs_its_own_script_alone(tmp_path: Path) -> None:
    text = make(5, 2, 3).page(tmp_path / "page.html").read_text(encoding="utf-8")
    page = Parsed(text)
    assert not re.search(r"https?://|\burl\(|@import|fetch\(|XMLHttpRequest|innerHTML|\beval\(", text)
    assert not {"src", "href", "action"} & {name for _, attributes in page.elements for name in attributes}
    (policy,) = (each["content"] for tag, each in page.elements if tag == "meta" and "http-equiv" in each)
    digest = base64.b64encode(hashlib.sha256(page.texts["script"][1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_an_expert_has_one_colour_in_the_page_and_in_the_picture(tmp_path: Path) -> None:
    from matplotlib.lines import Line2D

    # b is strongest in two layers of three, and a on the mean over them: it weighs much more in the third
    w_TLE = torch.tensor([[9.0, 0.0], [0.0, 1.0], [0.0, 1.0]]).expand(4, 3, 2)
    explanation = Explanation(tuple("wxyz"), ("k", "l", "m"), ("a", "b"), w_TLE)
    on_page = parsed(explanation, tmp_path).data["colours"]
    squares = draw(explanation).findobj(lambda each: isinstance(each, Line2D) and each.get_marker() == "s")
    in_picture = [square.get_color() for square in squares]
    # for each expert beside each of the two maps
    assert in_picture == on_page * 2
    assert len(set(on_page)) == 2


def test_the_strongest_experts_have_the_palettes_colours_and_their_share_is_fullness(tmp_path: Path) -> None:
    w_TLE = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])[:, None]
    page = parsed(Explanation(tuple("vwxyz"), ("l",), ("a", "b", "c"), w_TLE), tmp_path)
    assert page.data["colours"] == [PALETTE[1], PALETTE[0], OTHER]
    spans = [attributes["style"] for tag, attributes in page.elements if (attributes.get("class") or "") == "token"]
    red, green, blue = (int(PALETTE[0][at : at + 2], 16) for at in (1, 3, 5))
    assert spans[0] == f"background:rgba({red},{green},{blue},0.800)"
    assert spans[1] == f"background:rgba({red},{green},{blue},0.460)"
    assert spans[3] == "background:transparent"
    assert page.texts["sub"] == ["2", "2", "2", "1"]


def test_layers_are_grouped_by_block_and_kind(tmp_path: Path) -> None:
    layers = ("model.layers.0.q", "model.layers.0.v", "model.layers.10.q", "lm_head")
    data = parsed(Explanation(("x",), layers, ("a",), torch.ones(1, 4, 1)), tmp_path).data
    assert data["blocks"] == [["model.layers.0", [0, 1]], ["model.layers.10", [2]], ["lm_head", [3]]]
    assert data["kinds"] == [["q", [0, 2]], ["v", [1]], ["lm_head", [3]]]


def test_effects_are_shown_where_they_are_known(tmp_path: Path) -> None:
    explanation = make(3, 1, 3)
    assert parsed(explanation, tmp_path).data["effects"] == [None, None, None]
    known = explanation.with_effects({NAMES[1]: 0.25})
    assert parsed(known, tmp_path).data["effects"] == [None, 0.25, None]
    assert known.to_json()["effects"] == {NAMES[1]: 0.25}
    with pytest.raises(UnknownExpert, match="'nobody'"):
        explanation.with_effects({"nobody": 1.0})


def test_a_plot_that_ends_in_html_is_the_page(tmp_path: Path) -> None:
    explanation = make(3, 1, 3)
    assert explanation.plot(tmp_path / "x.html").read_text() == explanation.page(tmp_path / "y.html").read_text()


def test_the_base_alone_has_no_page(tmp_path: Path) -> None:
    base = Explanation(("x",), (), (), torch.empty(1, 0, 0))
    with pytest.raises(CompositionError, match="1 tokens, 0 layers and 0 experts"):
        base.page(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_a_long_text_with_a_router_of_few_experts_a_token_stays_small(tmp_path: Path) -> None:
    path = make(300, 100, 30, top_k=2).page(tmp_path / "page.html")
    # 8 bytes a weight that is not 0, as base64
    assert path.stat().st_size < 300 * 200 * 2 * 8 * 4 / 3 + 120_000
