"""The page on sources: its code runs, and it names every kind of archive."""

from __future__ import annotations

from pathlib import Path

from loraweave.extensions.sources.sources import archives

PAGE = Path(__file__).parents[3] / "docs" / "extensions" / "sources.md"


def test_the_code_of_the_page_runs(run_page):
    names = run_page(PAGE)
    assert names["report"].counts() == {"added": 33}
    assert names["hub"]["from a zip"].hash == names["hub"]["antonym"].hash


def test_the_page_names_every_kind_of_archive():
    suffixes = {*archives.ZIP_SUFFIXES, *archives.TAR_SUFFIXES} - {".tgz", ".tbz2", ".txz"}
    assert [suffix for suffix in suffixes if f"`{suffix}`" not in PAGE.read_text(encoding="utf-8")] == []
