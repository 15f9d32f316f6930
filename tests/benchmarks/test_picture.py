"""The pictures of the ways and of where a hub pays are made from the tables."""

from __future__ import annotations

import itertools
import re

import pytest

from benchmarks import picture
from benchmarks._run import ROOT
from benchmarks._unseen_report import tables


def test_the_picture_has_every_situation_and_the_same_data_give_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    rows = tables()["unseen, where a hub pays"].rows
    for theme in picture.THEMES:
        first = picture.draw(theme, tmp_path / "first").read_bytes()
        assert picture.draw(theme, tmp_path / "second").read_bytes() == first
        text = first.decode("utf-8")
        assert all(f"{row[0]} ({row[1]} tasks)" in text for row in rows)
        assert all(label in text for label, _, _ in picture.SERIES)


def test_the_picture_of_the_ways_has_the_means_of_the_table_and_of_the_readme(tmp_path):
    pytest.importorskip("matplotlib")
    table = tables()["unseen, 5 examples, scores"]
    [mean] = [row for row in table.rows if row[0] == "mean of all"]
    shown = {column: mean[table.columns.index(column)].split()[0] for _, column in picture.WAYS}
    alternative = re.search(r'<img alt="(Mean share[^"]*)"', (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    assert re.findall(r"\d\.\d+", alternative) == list(shown.values())
    for theme, narrow in itertools.product(picture.THEMES, (False, True)):
        path = picture.draw_ways(theme, tmp_path / "first", narrow=narrow)
        first = path.read_bytes()
        assert picture.draw_ways(theme, tmp_path / "second", narrow=narrow).read_bytes() == first
        text = first.decode("utf-8")
        assert all(f">{value}<" in text for value in shown.values())
        assert all(f">{label}<" in text for label, _ in picture.WAYS)
        # in points: a phone shows 390 pixels, of three quarters of a point each
        assert not narrow or float(re.search(r'width="([\d.]+)pt"', text)[1]) < 390
        assert (ROOT / "docs" / "images" / path.name).is_file()
