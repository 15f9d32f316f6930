"""What a notebook and a plain prompt show: tables with every name as text, and a composition on one line."""

import pickle
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import loraweave as lw
from loraweave.common.display import ShownTable
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.report import Report, ReportRow
from loraweave.hub.pool import ExpertPool
from loraweave.types import Candidate, Task

HOSTILE = "<script>alert(1)</script> [bold]&amp;\n:smile:"


class Read(HTMLParser):
    """The kinds of elements, and the texts of the cells."""

    def __init__(self, text):
        super().__init__()
        self.kinds, self.cells = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.kinds.add(tag)
        if tag in ("td", "th", "caption", "p"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


@pytest.fixture
def pool(tiny_llama, make_adapter):
    adapters = [make_adapter(tiny_llama, name, seed=seed) for seed, name in enumerate((HOSTILE, "b"))]
    return ExpertPool([replace(adapter, base_model="org/base") for adapter in adapters])


@pytest.fixture
def composed(tiny_llama, tokenizer, pool):
    row = ReportRow(HOSTILE, {HOSTILE: 0.5, "b": -1.0}, 0.25, None, 0.5, 1.0, 40)
    report = Report((row,), HOSTILE, "lowest", (), 1.0, 40)
    return Composition(tiny_llama, tokenizer, Task([("x", "y")]), pool, {HOSTILE: 0.5, "b": -1.0}, "linear", report)


@pytest.fixture
def hub(tmp_path, pool):
    with lw.Hub(tmp_path / "hub") as opened:
        opened.add(pool["b"], name="b", description=HOSTILE, license="mit")
        opened.add(pool[HOSTILE], name="other", tags=[HOSTILE])
        yield opened


def shown(thing):
    read = Read(thing._repr_html_())
    assert read.kinds <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "div", "p"}
    return " ".join(read.cells)


def test_names_are_nothing_but_text_in_every_notebook(composed, hub, pool):
    merged = lw.merge(list(pool.adapters.values()), [0.5, 0.5], progress=False)
    record = replace(hub.record("b"), name=HOSTILE)
    found = hub.search("anything", k=2)
    hits = type(found)([Candidate(HOSTILE, 0.5, HOSTILE, record)], hub)
    for thing in (composed, composed.report, merged.report, hits):
        assert HOSTILE.replace("\n", " ") in shown(thing).replace("\n", " ")


def test_a_hub_shows_its_adapters_and_of_many_the_first(hub, pool):
    text = shown(hub)
    assert all(each in text for each in ("2 adapters", "b", "other", "org/base", "MIT"))
    for number in range(30):
        hub.add(replace(pool["b"], name=f"copy {number}"))
    text = shown(hub)
    assert "32 adapters, the first 20" in text
    assert ("copy 17" in text, "copy 18" in text) == (True, False)


def test_results_of_a_search_stay_lists(hub):
    for found in (hub.search("anything", k=2), hub.similar("b"), lw.Retriever(hub).candidates("anything", k=2)):
        assert isinstance(found, list)
        assert found == list(found)
        assert all(each.name in shown(found) for each in found)
        again = pickle.loads(pickle.dumps(found))
        assert [each.name for each in again] == [each.name for each in found]


def test_a_composition_is_one_line(composed, tiny_llama, tokenizer):
    said = repr(composed)
    assert len(said.splitlines()) == 1
    assert len(said) < 300
    assert said.startswith("Composition(")
    assert "'b': -1" in said
    assert "alert(1)" in said
    base = replace(composed, all_weights={}, pool=None)
    assert "the base model" in repr(base)
    many = replace(composed, all_weights={f"adapter {n}": 1.0 + n for n in range(20)})
    assert len(repr(many)) < 300
    assert "'adapter 19': 20" in repr(many)
    assert "17 more" in repr(many)


def test_the_ways_compared_keep_their_names_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = ("base", "best_single", "weights by layer, learned")
    rows = tuple(ReportRow(name, {}, 5.39, 5.39, 0.0, 123.4, 1_000) for name in names)
    lines = repr(Report(rows, "base", "as asked", (), 1.0, 40).table()).splitlines()
    assert all(any(f"│ {name} " in line for line in lines) for name in names)
    assert max(map(len, lines)) <= 80


def test_the_text_of_a_table_is_a_text_in_a_kernel_too(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "passive" in repr(ShownTable.of(["name"], [["passive"]]))


def test_a_table_at_a_plain_prompt_is_a_table(composed, pool, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    merged = lw.merge(list(pool.adapters.values()), [0.5, 0.5], progress=False)
    for table in (composed.report, composed.report.table(), merged.report.table()):
        lines = repr(table).splitlines()
        assert len(lines) > 4
        assert max(map(len, lines)) <= 120
        assert set(lines[-1]) <= set("└─┴┘ ")
    text = str(composed.report)
    assert "[bold]" in text
    assert "0.250" in text
