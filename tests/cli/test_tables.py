"""Tables of the command line in 40, 60 and 80 columns: numbers and headings stay whole, and what is left out is named."""

from __future__ import annotations

from collections import Counter

import pytest
from command_line import adapter, call

import loraweave as lw
from loraweave.common.display import NUMBER

WIDE = 10_000
NAMES = ("left", "right", "pick_adjective_5_of_a_list_whose_words_are_many")

pytestmark = pytest.mark.parametrize("width", [40, 60, 80])


def tables(text):
    """[(heading, pieces of its cells) by column] of each table in a text."""
    found, heads = [], []
    for line in text.splitlines():
        parts = [part.strip() for part in line[1:-1].split(line[0])] if line[:1] in ("┃", "│") else []
        if line.startswith("┏"):
            heads = []
        elif line.startswith("┃"):
            heads = [f"{head} {part}".strip() for head, part in zip(heads or [""] * len(parts), parts, strict=True)]
        elif line.startswith("┡"):
            found.append([(head, []) for head in heads])
        for (_, pieces), part in zip(found[-1] if parts and line[0] == "│" else [], parts, strict=False):
            pieces += part.split()
    return found


def output(words, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    done = call(*words)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def check(words, width, monkeypatch):
    """The output in `width` columns beside that without a limit."""
    narrow, wide = output(words, width, monkeypatch), output(words, WIDE, monkeypatch)
    assert max(map(len, narrow.splitlines())) <= width
    assert "…" not in narrow
    pairs = list(zip(tables(narrow), tables(wide), strict=True))
    assert pairs
    for fitted, whole in pairs:
        heads = [head for head, _ in whole]
        # columns go from the right, and never the first two
        assert [head for head, _ in fitted] == heads[: len(fitted)]
        assert len(fitted) >= min(2, len(heads))
        if left_out := heads[len(fitted) :]:
            assert f"left out, for want of width: {', '.join(left_out)}" in " ".join(narrow.split())
        for (head, pieces), (_, cells) in zip(fitted, whole, strict=False):
            # a second run takes other seconds, and a name that is broken may leave a number
            assert head == "seconds" or numbers(cells) - numbers(pieces) == Counter(), head


def numbers(pieces):
    return Counter(piece for piece in pieces if NUMBER.fullmatch(piece))


@pytest.fixture
def hub(here, words_embedder):
    with lw.Hub("adapters") as opened:
        for seed, name in enumerate(NAMES):
            made = adapter(name, seed, base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
            opened.add(made, license="Apache-2.0", tags=["pool", "lists"], description="Choose the adjective of a list.")


@pytest.mark.parametrize(
    "words", [["list"], ["search", "the adjective"], ["show", NAMES[2]], ["history", NAMES[2]]], ids=str
)
def test_the_tables_of_a_hub(words, width, hub, monkeypatch):
    check(["hub", *words], width, monkeypatch)


def test_the_report_of_a_merge(width, two, monkeypatch):
    check(["merge", two / "left", two / "right", "--weights", "0.7,-0.4", "--force", "--out", "m"], width, monkeypatch)


def test_the_report_of_a_composition_and_its_score(width, base, two, rows, monkeypatch):
    words = ["--base", base, "--pool", two, "--examples", rows, "--method", "lorahub", "--budget", 9, "--out", "c"]
    check(["compose", *words], width, monkeypatch)
    check(["eval", "c", rows], width, monkeypatch)


def test_the_table_of_a_study(width, base, two, rows, monkeypatch):
    long = ", ".join(f"{{name: {name}, file: rows.jsonl}}" for name in ("letters", "other_letters"))
    said = f"base: {base}\npool: {two}\ntasks: [{long}]\nmethods: [base, uniform, best_single]\nshots: 1\nnum_test: 2\n"
    (two.parent / "study.yaml").write_text(said)
    check(["study", two.parent / "study.yaml"], width, monkeypatch)
