"""The pages on adding and on anomalies: their code runs, and what they list is what there is."""

from __future__ import annotations

from pathlib import Path

from loraweave.hub.health import anomalies
from loraweave.hub.intake import archives

ROOT = Path(__file__).parents[1]


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_code_of_the_page_on_anomalies_runs(run_page):
    names = run_page("docs/anomalies.md")
    assert (names["again"].quarantined, names["again"].anomalies[0].kind) == (True, "duplicate")
    assert len(names["hub"]) == 2


def test_the_code_of_the_page_on_adding_runs(run_page):
    names = run_page("docs/adding.md")
    assert names["report"].counts() == {"added": 33}
    assert len(names["hub"]) == 33


def test_the_page_on_anomalies_names_every_kind_and_policy():
    text = page("anomalies.md")
    assert [kind for kind in anomalies.KINDS if f"| `{kind}` |" not in text] == []
    assert [policy for policy in anomalies.POLICIES if f'`"{policy}"`' not in text] == []
    assert f"beyond {anomalies.THRESHOLD} of them" in text
    assert f"Below {anomalies.MIN_REFERENCE} adapters" in text


def test_the_page_on_adding_names_every_kind_of_archive():
    text = page("adding.md")
    short = (".tgz", ".tbz2", ".txz")
    suffixes = (*archives.ZIP_SUFFIXES, *archives.TAR_SUFFIXES)
    assert [suffix for suffix in suffixes if f"`{suffix}`" not in text and suffix not in short] == []
