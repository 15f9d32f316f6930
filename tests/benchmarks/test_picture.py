"""The picture of where a hub pays is made from the table."""

from __future__ import annotations

import pytest

from benchmarks import picture
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
