"""The search index follows the hub by what changed, and a large one is a file that is never believed blindly."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny_hubs
from counted_words import WORDS, Counts
from tiny_hubs import flip, run_sql

from loraweave.common.names import text_digest
from loraweave.errors import HubCorrupt
from loraweave.hub.hub import Hub
from loraweave.hub.search import keys, segments
from loraweave.hub.search import search as search_module
from loraweave.hub.search.search import SearchIndex
from loraweave.hub.tables.filtering import Filters
from loraweave.hub.tables.rows import Said
from loraweave.hub.tables.vectors import CHANGED, read_changes
from loraweave.types import BaseKey


def adapter(name, seed=0):
    return tiny_hubs.adapter(seed, name, base_model="base")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "MIN_SAVED", 1)
    with Hub(tmp_path / "hub") as opened:
        for number, word in enumerate(WORDS):
            opened.add(adapter(word, number), examples=[word], tags=["even"] if number % 2 == 0 else ["odd"])
        yield opened


def names(index, text, k=1, **filters):
    return [hit.record.name for hit in index.hits(index.embed([text]), k, Filters(**filters))[0]]


def files(hub):
    return sorted((hub.path / "index").iterdir())


def add_new(hub):
    for number in range(3):
        hub.add(adapter(f"new {number}", 9 + number), examples=["cat cat dog"])


def reads(hub, monkeypatch):
    """What the hub is asked for, as (since, number of changes)."""
    asked, original = [], Hub.changes

    def watched(self, embedder_id, **options):
        changes = original(self, embedder_id, **options)
        asked.append((options["since"], len(changes.page)))
        return changes

    monkeypatch.setattr(Hub, "changes", watched)
    return asked


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


def test_another_process_maps_the_saved_index_and_reads_only_what_changed_since(hub, monkeypatch):
    names(SearchIndex(hub, embedder=Counts()), "cat")
    hub.remove("cat")
    asked = reads(hub, monkeypatch)
    with Hub(hub.path) as other:
        index = SearchIndex(other, embedder=Counts())
        assert names(index, "dog", k=9) == ["dog", "sum", "film", "word"]
    assert asked[0][0] > 0
    assert sum(number for _, number in asked) == 1


def test_the_saved_index_is_one_file_for_an_embedder_and_a_kind_of_index(hub):
    for options in ({}, {"index": "flat"}, {"embedder": Counts("others")}):
        names(SearchIndex(hub, **({"embedder": Counts()} | options)), "cat")
    assert len(files(hub)) == 3
    hub.add(adapter("new", 9), examples=["cat cat dog"])
    names(SearchIndex(hub, embedder=Counts()), "cat")
    assert len(files(hub)) == 3


def behind(data, mark, new):
    """The data with `new` in place of what stands behind the mark."""
    at = data.index(mark) + len(mark)
    return data[:at] + new + data[at + len(new) :]


DAMAGES = {
    "cut": lambda data: data[:-9],
    "flipped": lambda data: data[:-3] + bytes([data[-3] ^ 64]) + data[-2:],
    "other format": lambda data: data.replace(b'\\"format\\": 1', b'\\"format\\": 9'),
    "other size": lambda data: data.replace(b'\\"dim\\": 5', b'\\"dim\\": 6'),
    "other catalogue": lambda data: behind(data, b'\\"identity\\": \\"', b"0" * 32),
    "from the future": lambda data: behind(data, b'\\"generation\\": ', b"9"),
    "missing": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_index_file_that_is_damaged_foreign_or_missing_is_made_again(hub, damage):
    names(SearchIndex(hub, embedder=Counts()), "cat")
    (path,) = files(hub)
    before = path.read_bytes()
    path.unlink()
    if DAMAGES[damage] is not None:
        path.write_bytes(damaged := DAMAGES[damage](before))
        assert damaged != before
    with Hub(hub.path) as other:
        embedder = Counts()
        index = SearchIndex(other, embedder=embedder)
        assert [names(index, word)[0] for word in WORDS] == list(WORDS)
        # of the stored vectors, not of the texts
        assert embedder.seen == list(WORDS)
    assert files(hub) == [path]
    assert len(path.read_bytes()) == len(before)


def test_verify_names_a_damaged_index_file(hub):
    names(SearchIndex(hub, embedder=Counts()), "cat")
    assert hub.verify().ok
    (path,) = files(hub)
    flip(path, -3)
    (problem,) = hub.verify().problems
    assert str(path) in problem
    assert "made" not in problem.split(";")[0]


def test_a_catalogue_put_back_from_a_copy_gets_its_own_index(hub, tmp_path):
    names(SearchIndex(hub, embedder=Counts()), "cat")
    hub.close()
    shutil.copytree(hub.path, tmp_path / "copy")
    with Hub(hub.path) as first:
        for number in range(3):
            first.add(adapter(f"more {number}", 20 + number), examples=["cat dog"])
        search_module_names = names(SearchIndex(first, embedder=Counts()), "cat dog", k=3)
    assert search_module_names == [f"more {number}" for number in range(3)]
    shutil.rmtree(tmp_path / "copy" / "index")
    shutil.copytree(hub.path / "index", tmp_path / "copy" / "index")
    with Hub(tmp_path / "copy") as second:
        # as many generations on, but with another content
        while second.generation < 30:
            second.update("cat", description=f"film {second.generation}")
        assert set(names(SearchIndex(second, embedder=Counts()), "cat dog", k=9)) == set(WORDS)


def test_the_index_of_a_read_only_hub_is_saved_in_the_cache_and_mapped_by_the_next_process(hub, monkeypatch):
    monkeypatch.setattr(Hub, "writable", property(lambda self: False))
    assert names(SearchIndex(hub, embedder=Counts()), "cat") == ["cat"]
    assert not (hub.path / "index").exists()
    asked = reads(hub, monkeypatch)
    with Hub(hub.path) as other:
        assert names(SearchIndex(other, embedder=Counts()), "dog") == ["dog"]
    assert [(since > 0, number) for since, number in asked] == [(True, 0)]


def test_a_read_only_hub_is_searched_by_the_newer_of_its_own_index_and_the_caches(hub, monkeypatch):
    names(SearchIndex(hub, embedder=Counts()), "cat")
    add_new(hub)
    monkeypatch.setattr(search_module, "MAX_LATE", 2)
    asked = reads(hub, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Hub, "writable", property(lambda self: False))
        for _ in range(2):
            assert names(SearchIndex(hub, embedder=Counts()), "cat cat dog", k=3) == ["new 0", "new 1", "new 2"]
    # the first follows three changes, the second nothing
    assert sum(number for _, number in asked) == 3
    assert len(files(hub)) == 1


def test_a_process_that_follows_many_changes_saves_the_index_for_the_next(hub, monkeypatch):
    names(SearchIndex(hub, embedder=Counts()), "cat")
    add_new(hub)
    monkeypatch.setattr(search_module, "MAX_LATE", 2)
    asked = reads(hub, monkeypatch)
    for _ in range(2):
        with Hub(hub.path) as other:
            assert names(SearchIndex(other, embedder=Counts()), "cat cat dog", k=3) == ["new 0", "new 1", "new 2"]
    assert sum(number for _, number in asked) == 3


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


def test_an_index_that_cannot_be_saved_is_used_from_memory(hub, monkeypatch):
    def full(*arguments):
        raise OSError(28, "no space left")

    monkeypatch.setattr(segments, "write_arrays", full)
    assert names(SearchIndex(hub, embedder=Counts()), "cat") == ["cat"]


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
