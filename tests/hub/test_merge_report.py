"""The report of a merge: read back from the card, as a table, and as a picture."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import tiny_hubs
import torch
from rich.console import Console

from loraweave.composer.merge.merge import merge
from loraweave.errors import CompositionError, PackageMissing
from loraweave.hub.adapter import Adapter
from loraweave.hub.merge_report import MergeReport


def adapter(name: str, seed: int, layers: tuple[str, ...] = ("m.0.q", "m.1.q", "m.0.v")) -> Adapter:
    return tiny_hubs.adapter(seed, name, layers=layers, base_model="tiny")


@pytest.fixture
def merged() -> Adapter:
    return merge([adapter("left", 0), adapter("right", 1, ("m.0.q",))], [0.5, -2.0], rank=2)


def test_an_adapter_that_was_not_merged_has_an_empty_report() -> None:
    report = adapter("a", 0).report
    assert len(report) == 0
    assert report.rows() == []
    with pytest.raises(CompositionError, match="not merged"):
        report.plot("nowhere.png")


def test_the_report_survives_the_folder(merged: Adapter, tmp_path: Path) -> None:
    again = Adapter.from_pretrained(merged.save_pretrained(tmp_path / "m"))
    assert again.report == merged.report
    assert sorted(zip(again.report.names, again.report.weights, strict=True)) == [("left", 0.5), ("right", -2.0)]


def test_the_cosine_of_whole_updates_is_that_of_one_long_vector(merged: Adapter) -> None:
    a, b = adapter("left", 0), adapter("right", 1, ("m.0.q",))
    left = torch.cat([0.5 * a.delta(n).flatten() for n in sorted(a.layers)])
    right = torch.cat([(-2.0 * b.delta(n) if n in b.layers else torch.zeros(3, 5)).flatten() for n in sorted(a.layers)])
    wanted = float(left @ right / left.norm() / right.norm())
    found = merged.report.cosines()
    assert found[0][1] == found[1][0] == pytest.approx(wanted, abs=1e-5)
    assert found[0][0] == 1.0


def test_a_merge_that_does_not_compare_its_parents_gives_the_same_adapter_and_says_what_its_report_lacks(
    merged: Adapter, tmp_path: Path
) -> None:
    quick = merge([adapter("left", 0), adapter("right", 1, ("m.0.q",))], [0.5, -2.0], rank=2, interference=False)
    assert quick.hash == merged.hash
    assert [row[1:6] for row in quick.report.rows()] == [row[1:6] for row in merged.report.rows()]
    assert {row[6:] for row in quick.report.rows()} == {("-", "-")}
    for act in (quick.report.cosines, lambda: quick.report.plot(tmp_path / "map.png")):
        with pytest.raises(CompositionError, match=r"does not compare .*interference=True"):
            act()


def test_the_table_has_a_row_for_each_module_name(merged: Adapter) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(merged.report.table())
    text = console.export_text()
    assert "linear" in text
    assert "0.5 left" in text
    assert [row[0] for row in merged.report.rows()] == ["q", "v"]
    assert merged.report.rows()[0][1:4] == ("2", "2 to 4", "2")


def test_the_plot_is_a_picture(merged: Adapter, tmp_path: Path) -> None:
    assert merged.report.plot(tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in merged.report.plot(tmp_path / "map.svg").read_text()


def test_the_plot_has_the_layers_in_the_order_that_people_count_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: saved.append(figure))
    layers = tuple(f"model.layers.{block}.{kind}" for block in range(12) for kind in ("q", "v"))
    merged = merge([adapter("left", 0, layers), adapter("right", 1, layers[:5])], [1.0, 1.0])
    merged.report.plot(tmp_path / "map.png")
    axes = saved[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(layers)
    # the rows moved along with their names
    rows = {
        label.get_text(): list(row) for label, row in zip(axes.get_yticklabels(), axes.images[0].get_array(), strict=True)
    }
    for layer in layers:
        norms = merged.report[layer].norms
        assert rows[layer] == pytest.approx([norm / sum(norms) for norm in norms])


def test_a_plot_without_matplotlib_says_what_to_install(
    merged: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PackageMissing, match=r"loraweave\[plot\]"):
        merged.report.plot(tmp_path / "map.png")


@pytest.mark.parametrize("damage", [{"report": 3}, {"report": {"q": {}}}, {"recipe": {}}, {"report": {"q": []}}])
def test_a_damaged_card_gives_an_empty_report(merged: Adapter, damage: dict[str, object]) -> None:
    card = json.loads(json.dumps(dict(merged.card)))
    assert len(MergeReport.from_card(card | damage)) == 0
