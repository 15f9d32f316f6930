"""What an Explanation says of known weights: means, load, table, JSON."""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path

import pytest
import torch
from command_line import cells
from rich.console import Console

from loraweave.errors import CompositionError, PackageMissing
from loraweave.extensions.explain.costs import Cost, LayerCost
from loraweave.extensions.explain.explanation import Explanation

LAYERS = ("model.layers.0.q", "model.layers.1.q")


@pytest.fixture
def known() -> Explanation:
    """Token "one" gives all to "a", token " two" half of it to each in the second layer, and 2 to "a" in the first."""
    w_TLE = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.5, -0.5]]])
    return Explanation(("one", " two"), LAYERS, ("a", "b"), w_TLE)


def printed(explanation: Explanation) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(explanation.table())
    return capture.get()


def test_means_are_over_tokens_and_over_layers(known: Explanation) -> None:
    assert known.by_layer_LE.tolist() == [[1.5, 0.0], [0.75, -0.25]]
    assert known.by_token_TE.tolist() == [[1.0, 0.0], [1.25, -0.25]]


def test_load_and_entropy_are_those_of_each_layer(known: Explanation) -> None:
    load = known.load
    assert list(load) == list(LAYERS)
    assert load[LAYERS[0]].share_E.tolist() == [1.0, 0.0]
    assert load[LAYERS[1]].share_E.tolist() == [0.75, 0.25]
    assert load[LAYERS[1]].chosen_E.tolist() == [1.0, 0.5]
    assert load[LAYERS[1]].entropy == pytest.approx(math.log(2) / 2, rel=1e-12)
    assert known.total.share_E.tolist() == [0.9, 0.1]


def test_tokens_that_a_layer_never_sees_count_nowhere() -> None:
    w_TLE = torch.tensor([[[1.0, 0.0], [math.nan, math.nan]], [[0.0, 1.0], [0.0, 4.0]]])
    found = Explanation(("x", "y"), LAYERS, ("a", "b"), w_TLE)
    assert [load.num_tokens for load in found.load.values()] == [2, 1]
    assert found.by_layer_LE.tolist() == [[0.5, 0.5], [0.0, 4.0]]
    assert found.total.chosen_E.tolist() == [1 / 3, 2 / 3]
    assert found.to_json()["weights"][0] == [[1.0, 0.0], [None, None]]


def test_the_table_is_ordered_by_share_and_says_where(known: Explanation) -> None:
    rows = printed(known).splitlines()[-2:]
    assert cells(rows[0]) == [
        "a",
        "90.0%",
        "100.0%",
        "1.125",
        "model.layers.0.q",
        "' two', 'one'",
    ]
    assert cells(rows[1])[:2] == ["b", "10.0%"]
    assert "2 tokens, 2 layers, 2 experts; mean entropy" in printed(known)


def test_the_table_shows_names_as_they_are() -> None:
    names = ("[red]x[/red]", "$a_b$ <i>", ":smile:\n\x1b[31m", "情感" * 50)
    found = Explanation(("x",), LAYERS, names, torch.ones(1, 2, 4))
    console = Console(width=400)
    with console.capture() as capture:
        console.print(found.table())
    assert all(name in capture.get() for name in ("[red]x[/red]", "$a_b$ <i>", ":smile:  [31m", "情感" * 50))


def test_a_long_pool_ends_in_a_row_for_the_others() -> None:
    shown = printed(Explanation(("x",), LAYERS, tuple(map(str, range(40))), torch.arange(40.0).expand(1, 2, 40)))
    assert ["10 others", "5.8%"] in [cells(line)[:2] for line in shown.splitlines()]


def test_json_gives_size_one_to_an_axis_on_which_nothing_varies(known: Explanation) -> None:
    assert json.loads(json.dumps(known.to_json()))["weights"] == known.w_TLE.tolist()
    constant = Explanation(("x", "y", "z"), LAYERS, ("a",), torch.full((3, 2, 1), 1 / 3)).to_json()
    assert constant["weights"] == [[[0.333333]]]
    assert constant["load"][LAYERS[0]] == {"share": [1.0], "chosen": [1.0], "entropy": 0.0, "num_tokens": 3}


def test_the_base_alone_has_a_table_and_json_and_no_picture(tmp_path: Path) -> None:
    base = Explanation(("x",), (), (), torch.empty(1, 0, 0))
    assert "the base model itself" in printed(base)
    assert base.to_json()["weights"] == [[]]
    with pytest.raises(CompositionError, match="1 tokens, 0 layers and 0 experts"):
        base.plot(tmp_path / "x.png")


def test_weights_that_do_not_fit_the_names_are_refused() -> None:
    with pytest.raises(CompositionError, match=r"\(1, 2, 3\), but .* named are \(1, 2, 2\)"):
        Explanation(("x",), LAYERS, ("a", "b"), torch.zeros(1, 2, 3))


def test_a_plot_without_matplotlib_says_what_to_install(
    known: Explanation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PackageMissing, match=r"loraweave\[plot\]"):
        known.plot(tmp_path / "map.png")


@pytest.mark.parametrize(("suffix", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_suffix_names_the_format(known: Explanation, suffix: str, begin: bytes, tmp_path: Path) -> None:
    assert known.plot(tmp_path / f"map.{suffix}").read_bytes().startswith(begin)


@pytest.mark.parametrize("name", ["map.xyz", "map"])
def test_a_format_that_nobody_knows_is_named_and_nothing_is_written(known: Explanation, name: str, tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match=f"ends in one of .*png.*{name}"):
        known.plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_shows_names_as_text_and_a_plain_prompt_whole_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "<script>alert(1)</script> [bold]&amp;"
    explanation = Explanation(("x", "y"), ("l",), (name, "b"), torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]))
    html = explanation._repr_html_()
    assert (escape(name) in html, "<script" in html) == (True, False)
    monkeypatch.setenv("COLUMNS", "120")
    for table in (explanation.table(), Cost({"l": LayerCost(1, 2, 3, 4)}).table()):
        lines = repr(table).splitlines()
        assert len(lines) > 4
        assert max(map(len, lines)) <= 120
        assert set(lines[-1]) <= set("└─┴┘ ")
