"""The search index follows the hub by what changed."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from counted_words import WORDS, Counts
from searched_hubs import adapter, add_new, filled, names, reads
from tiny_hubs import run_sql

from loraweave.common.names import text_digest
from loraweave.errors import HubCorrupt
from loraweave.hub.hub import Hub
from loraweave.hub.search import keys
from loraweave.hub.search import search as search_module
from loraweave.hub.search.search import SearchIndex
from loraweave.hub.tables.rows import Said
from loraweave.hub.tables.vectors import CHANGED, read_changes
from loraweave.types import BaseKey


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as opened:
        yield filled(opened)


def test_only_what_changed_is_read_again(hub, monkeypatch):
    index = SearchIndex(hub, embedder=Counts())
    names(index, "cat")
    asked = reads(hub, monkeypatch)
    hub.add(adapter("new", 9), examples=["cat cat dog"])
    hub.remove("dog")
    hub.update("sum", examples=["film"])
    assert names(index, "dog", k=9)[0] == "new"
    assert names(index, "sum")[0] != "sum"
    assert names(index, "film", k=2) == ["sum", "film"]
    assert [number for since, number in asked if since == 0] == []
    # three changes, then the vectors that this index stored itself, which change no adapter
    assert sum(number for _, number in asked) == 3


def test_threads_that_search_first_at_the_same_time_read_the_hub_once(hub, monkeypatch):
    index, begin = SearchIndex(hub, embedder=Counts()), threading.Barrier(4)
    asked = reads(hub, monkeypatch)

    def search(_):
        begin.wait()
        return names(index, "cat")

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(search, range(4))) == [["cat"]] * 4
    assert sum(number for since, number in asked if since == 0) == len(WORDS)


def test_adapters_that_are_added_while_all_are_read_are_found(hub, monkeypatch):
    original = Hub.changes

    def changed(self, embedder_id, **options):
        changes = original(self, embedder_id, **options)
        monkeypatch.setattr(Hub, "changes", original)
        add_new(hub)
        return changes

    monkeypatch.setattr(Hub, "changes", changed)
    index = SearchIndex(hub, embedder=Counts())
    assert names(index, "cat cat dog", k=3) == ["new 0", "new 1", "new 2"]
    assert names(index, WORDS[-1]) == [WORDS[-1]]


def test_renamed_adapters_are_found_under_the_new_name_without_embedding_again(hub):
    embedder = Counts()
    index = SearchIndex(hub, embedder=embedder)
    names(index, "cat")
    embedder.seen.clear()
    hub.rename("cat", "kitten")
    hub.update("dog", tags=["animal"])
    assert names(index, "cat") == ["kitten"]
    assert names(index, "dog", tags="animal") == ["dog"]
    assert embedder.seen == ["cat", "dog"]


@pytest.mark.parametrize("page", [1, 2, 4096])
def test_keys_that_are_missing_on_several_pages_are_made_together_and_stored(hub, monkeypatch, page):
    hub.store_vectors("counts", [("dog", text_digest("of other texts"), np.ones(5))])
    original, batches = Hub.changes, []
    monkeypatch.setattr(Hub, "changes", lambda self, *names, **options: original(self, *names, **options, limit=page))
    monkeypatch.setattr(search_module, "_MANY_MISSING", 2)
    watched = search_module.made_keys

    def counted(embed, given, records):
        batches.append(len(records))
        return watched(embed, given, records)

    monkeypatch.setattr(search_module, "made_keys", counted)
    index = SearchIndex(hub, embedder=Counts())
    for word in WORDS:
        assert names(index, word) == [word]
    assert sum(batches) == len(WORDS)
    assert max(batches) == max(2, min(page, len(WORDS)))
    assert {name: key.argmax() for name, (_, key) in hub.vectors("counts").items()} == {w: n for n, w in enumerate(WORDS)}


def test_a_name_that_another_takes_between_two_pages_has_the_key_of_each(hub, monkeypatch):
    original = Hub.changes

    def changes(self, *names, after, **options):
        if after == 1:
            self.rename("cat", "bird")
            self.add(adapter("cat", 9), examples=["film film cat"])
        return original(self, *names, after=after, **options, limit=1)

    index = SearchIndex(hub, embedder=Counts())
    with monkeypatch.context() as patch:
        patch.setattr(Hub, "changes", changes)
        patch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, 9, dtype))
        keys_ND = index._follow(index._empty()).keys.segments[0].keys_ND
    np.testing.assert_allclose(np.linalg.norm(keys_ND, axis=1), 1, rtol=1e-6)
    assert keys_ND[[0, -1]].argmax(axis=1).tolist() == [WORDS.index("cat"), WORDS.index("film")]


def test_rows_and_vectors_are_read_by_few_statements(hub):
    for number in range(60):
        hub.add(adapter(f"a{number}", 9 + number), examples=["cat"])
    names(SearchIndex(hub, embedder=Counts()), "cat")
    statements = []
    with hub._catalogue.reading() as connection:
        connection.set_trace_callback(statements.append)
        changes = read_changes(connection, "counts", since=0, after=0, limit=4096, where="here")
        connection.set_trace_callback(None)
    assert [change.said.name for change in changes.page][-1] == "a59"
    assert all(change.vector is not None for change in changes.page)
    assert len(statements) < 10


def test_filters_equal_a_choice_from_everything_ranked(hub, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(search_module, "_NUM_TRIED", 0)
    for number in range(60):
        text = " ".join(rng.choice(WORDS, size=4))
        hub.add(
            adapter(f"a{number}", 30 + number), examples=[text], tags=["rare"] if number % 20 == 0 else [], license="MIT"
        )
    index = SearchIndex(hub, embedder=Counts())
    for text in ("cat", "film word", "sum dog dog"):
        everything = index.hits(index.embed([text]), 99)[0]
        bases = ({"base_model": "base"}, {"base_model": BaseKey("base")}, {"base_model": BaseKey("other")})
        for filters in ({"tags": "rare"}, {"tags": ["even"]}, {"license": "mit"}, {"tags": "none"}, *bases):
            passing = {record.name for record in hub.records(**filters)}
            want = [hit.record.name for hit in everything if hit.record.name in passing]
            for k in (1, 3, 99):
                assert names(index, text, k=k, **filters) == want[:k]


def test_a_filter_reads_the_records_that_it_lets_through_and_no_others(hub, monkeypatch):
    from loraweave.hub.tables import rows

    seen, original = [], rows._decode
    monkeypatch.setattr(rows, "_decode", lambda found: seen.append(found[1]) or original(found))
    assert [record.name for record in hub.records(tags="odd")] == ["dog", "film"]
    assert seen == ["dog", "film"]


@pytest.mark.parametrize(
    ("filters", "want"),
    [
        ({"tags": "even"}, ["cat", "sum", "word"]),
        ({"tags": ("even", "odd")}, []),
        ({"base_model": "base", "tags": ["odd"]}, ["dog", "film"]),
        ({"base_model": "Base"}, []),
        ({"license": ["mit", "Apache-2.0"]}, ["dog"]),
        ({"license": ()}, []),
        ({"tags": "\ud800"}, ["cat"]),
    ],
)
def test_records_are_filtered_by_their_labels(hub, filters, want):
    hub.update("dog", license="MIT")
    hub.update("cat", tags=["even", "\ud800"])
    assert [record.name for record in hub.records(**filters)] == want
    assert hub.verify().ok


def test_verify_names_labels_that_are_not_the_records(hub):
    run_sql(hub.path, "UPDATE labels SET value = 'x' WHERE kind = 'tag' AND value = 'odd' AND seq = 2")
    (problem,) = hub.verify().problems
    assert "adapter 'dog'" in problem
    assert "labels" in problem


def test_a_missing_state_row_is_named_by_a_search(hub):
    index = SearchIndex(hub, embedder=Counts())
    run_sql(hub.path, "DELETE FROM state")
    with pytest.raises(HubCorrupt, match="state row is missing"):
        names(index, "cat")


def test_changes_come_in_pages_by_seq(hub):
    before = hub.generation
    for word in ("word", "cat", "film"):
        hub.update(word, description="x")
    hub.remove("film")
    first = hub.changes("counts", since=before, limit=2)
    second = hub.changes("counts", since=before, after=first.page[-1].seq, limit=2)
    seen = [(change.seq, change.said and change.said.name) for change in (*first.page, *second.page)]
    assert seen == [(1, "cat"), (4, None), (5, "word")]
    assert (first.generation, first.num_adapters) == (before + 4, 4)
    assert not hub.changes("counts", since=before + 4).page


def test_what_changed_is_found_by_its_generation_and_not_among_all_rows(hub):
    with hub._catalogue.reading() as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN {CHANGED}", (1, 0, 9)).fetchall()
    assert "changes_by_generation (generation>?)" in plan[0][3]


def test_what_adapters_say_is_what_their_records_say_wherever_their_rows_lie(hub):
    from loraweave.hub.tables import rows

    for number in range(12):
        hub.add(adapter(f"a{number}", 40 + number), description=f"text {number}", examples=[f"é {number}", "cat"])
    hub.remove("a3")
    hub.quarantine("a5")
    with hub._catalogue.reading() as connection:
        every = {row.seq: row.record for row in rows.every(connection)}
        seqs = sorted(every)
        # neighbours, also around a row that is gone, then rows far apart, in any order, and some that are not there
        for asked in (seqs, seqs[::-1], [seqs[0], seqs[-1]], seqs[::5], [*seqs[2:4], 10_000], [10_000], []):
            found = rows.said(connection, asked)
            wanted = {seq: every[seq] for seq in sorted(asked) if seq in every and not every[seq].quarantined}
            assert found == {seq: (one.name, one.description, one.examples) for seq, one in wanted.items()}
            assert list(found) == list(wanted)
            assert [row.seq for row in rows.stored_rows(connection, asked)] == sorted(seq for seq in asked if seq in every)


def test_a_key_stands_for_the_texts_as_json_which_earlier_releases_have_stored():
    for name, description, examples in (("a", "", ()), ("b", 'said "so"\n\u00e9 \U0001f600', ("", " x ", "two\ttabs\x00"))):
        one = Said(name, description, examples)
        assert keys.digest_of(one) == text_digest(json.dumps([keys.DESCRIPTION_WEIGHT, keys.texts_of(one)]))
