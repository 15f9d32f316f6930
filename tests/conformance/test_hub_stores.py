"""What every pair of a catalogue and a place for blobs must do; SQLite and a folder, the first of them, is the measure."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from installed import needs_entry
from store_places import opened, same
from tiny_hubs import Saved, adapter, flip

from loraweave.errors import (
    AdapterCorrupt,
    AdapterExists,
    AdapterNotFound,
    DimensionMismatch,
    HubCorrupt,
    HubError,
)
from loraweave.hub.hub import Hub
from loraweave.retrieval.retriever import Retriever


def damage(hub, content_hash):
    """Changes the stored bytes behind the hub's back, and forgets the copy of this machine."""
    blobs = hub._blobs
    if hasattr(blobs, "copies"):
        store, root = blobs._store()
        path = f"{root}/blobs/{content_hash[:2]}/{content_hash}.safetensors"
        data = bytearray(store.cat_file(path))
        data[-1] ^= 4
        store.pipe_file(path, bytes(data))
        blobs.copies.remove(content_hash)
        return
    flip(Path(blobs.place(content_hash)))


def test_an_adapter_comes_back_bit_for_bit_also_through_another_opening_without_its_copy(place, hub):
    texts = {"description": "says hello", "examples": ("hello",), "tags": ("greeting",), "license": "MIT"}
    stored = hub.add(adapter(1, card={"seed": 1}), **texts)
    assert same(hub["adapter 1"], adapter(1))
    if hasattr(hub._blobs, "copies"):
        hub._blobs.copies.remove(stored.hash)
    with opened(place) as other:
        assert same(other["adapter 1"], adapter(1))
        assert list(other) == [stored] == list(hub)
        assert {key: getattr(stored, key) for key in texts} == texts
        assert other.record("adapter 1").card["seed"] == 1


def test_the_same_content_is_stored_once_and_under_another_name_too(hub):
    first = hub.add(adapter(1))
    generation = hub.generation
    assert hub.add(adapter(1), description="not taken") == first
    assert hub.generation == generation
    twin = hub.add(adapter(1, base_model="org/twin"), name="twin")
    assert twin.hash == first.hash
    assert [hub[name].base_model for name in ("adapter 1", "twin")] == ["org/base", "org/twin"]
    assert list(hub._blobs.names()) == [first.hash]
    hub.remove("adapter 1")
    assert hub.gc() == 0
    assert same(hub["twin"], adapter(1))
    said = rf"another adapter, with hash {first.hash}, not {adapter(2).hash}.*hub\.remove\('twin'\)"
    with pytest.raises(AdapterExists, match=said):
        hub.add(adapter(2), name="twin")
    assert len(list(hub._blobs.names())) == 1


def test_a_name_has_versions_that_every_opening_sees_and_gc_keeps(place, hub):
    hub.add(adapter(1, "x"), description="first")
    hub.store_vectors("e", [("x", "d", np.ones(3))])
    hub.add(adapter(2, "x"), replace=True)
    assert hub.vectors("e") == {}
    hub.add(adapter(3, "x"), replace=True, description="third")
    with opened(place) as other:
        other.rollback("x", 1)
        found = [(record.version, record.hash, record.description) for record in hub.history("x")]
        hashes = [adapter(seed).hash for seed in (1, 2, 3, 1)]
        assert found == list(zip((1, 2, 3, 4), hashes, ("first", "first", "third", "first"), strict=True))
        assert hub.gc() == 0
        assert same(other.get("x", version=2), adapter(2))
        assert hub.verify().ok
        assert other.prune("x", keep=2) == 2
        assert hub.gc() > 0
        assert list(hub._blobs.names()) == sorted({adapter(1).hash, adapter(3).hash})
        with pytest.raises(AdapterNotFound, match="it has 3, 4"):
            hub.get("x", version=1)
        other.remove("x")
        hub.gc()
        assert list(hub._blobs.names()) == []
        assert hub.verify().ok


def test_names_are_free_text_and_changes_show_at_once_in_order_of_addition(place, hub):
    names = ["b", "a", "A", "it's 100% ?; DROP TABLE adapters", "C:\\x", "名前 🦙", "%s"]
    for seed, name in enumerate(names):
        hub.add(adapter(seed), name=name)
    with opened(place) as other:
        assert [record.name for record in other] == names
        assert other.update("a", description="new ?", tags=["x"]).tags == ("x",)
        assert hub.record("a").description == "new ?"
        hub.rename("b", "zz")
        assert [record.name for record in other.records()][:2] == ["zz", "a"]
        with pytest.raises(AdapterExists):
            other.rename("a", "A")
        hub.remove("A")
        assert "A" not in other
        assert len(other) == len(names) - 1
        with pytest.raises(AdapterNotFound, match="did you mean 'a'"):
            other["A"]


def test_every_change_raises_the_generation_and_nothing_else_does(hub):
    seen = [hub.generation]
    for change in (
        lambda: hub.add(adapter(1)),
        lambda: hub.update("adapter 1", description="x"),
        lambda: hub.store_vectors("e", [("adapter 1", "d", np.ones(3))]),
        lambda: hub.rename("adapter 1", "y"),
        lambda: hub.remove("y"),
        lambda: hub.add(adapter(2)),
    ):
        change()
        seen.append(hub.generation)
    assert all(later > earlier for earlier, later in itertools.pairwise(seen))
    hub.verify(), len(hub), list(hub), hub.vectors("e"), hub.pool(), hub.store_vectors("e", [("gone", "d", np.ones(3))])
    assert hub.generation == seen[-1]


def test_vectors_come_back_bit_for_bit_follow_a_rename_and_go_with_their_adapter(place, hub):
    rng = np.random.default_rng(0)
    # subnormal and large numbers too
    rows_ND = (rng.standard_normal((3, 33)) * 10.0 ** rng.integers(-44, 38, (3, 33))).astype(np.float32)
    for seed in range(3):
        hub.add(adapter(seed))
    hub.store_vectors("e", [(f"adapter {seed}", f"d{seed}", rows_ND[seed]) for seed in (2, 0, 1)])
    hub.store_vectors("e", [("adapter 1", "again", rows_ND[1] / 2), ("gone", "d", rows_ND[0])])
    hub.rename("adapter 0", "zero")
    hub.remove("adapter 2")
    with opened(place) as other:
        found = other.vectors("e")
        assert other.vectors("another") == {}
    assert list(found) == ["zero", "adapter 1"]
    assert (found["zero"][0], found["zero"][1].dtype) == ("d0", np.float32)
    assert np.array_equal(found["zero"][1], rows_ND[0])
    assert np.array_equal(found["adapter 1"][1], rows_ND[1] / 2)
    with pytest.raises(DimensionMismatch):
        hub.store_vectors("e", [("zero", "d", np.array([np.nan]))])
    # another size is another version of the embedder
    hub.store_vectors("e", [("zero", "d", np.ones(2))])
    assert list(hub.vectors("e")) == ["zero"]


def test_a_search_finds_what_it_finds_in_a_folder(tmp_path, hub):
    words = ["translate", "german", "french", "summarise", "classify", "review", "legal", "medical", "code", "rude"]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 4)) for _ in range(12)]
    with Hub(tmp_path / "measure") as measure:
        for each in (hub, measure):
            for seed, text in enumerate(texts):
                examples = [text[::-1]] if seed % 3 else ()
                each.add(adapter(seed), description=text, examples=examples, tags=["odd"][: seed % 2])
        pair = [Retriever(each, embedder="hashing") for each in (hub, measure)]
        for query, k, tags in [("translate german", 5, ()), ("a rude review", 40, ()), ("code", 3, ("odd",))]:
            found, wanted = (
                [(c.name, c.score, c.evidence) for c in each.candidates(query, k=k, tags=tags)] for each in pair
            )
            assert found == wanted
            assert wanted
        for each in (hub, measure):
            each.update("adapter 3", description="code code code")
            each.remove("adapter 4")
        found, wanted = ([(c.name, c.score) for c in each.candidates("code", k=30)] for each in pair)
        assert found == wanted


@needs_entry("examiners", "anomalies")
def test_anomalies_are_found_and_put_aside_and_a_search_finds_the_rest(place, hub):
    for seed in range(13):
        hub.add(adapter(seed), description="code")
    odd = adapter(20)
    factors = odd.layers["layer"]
    odd = replace(odd, layers={"layer": replace(factors, b_OR=1000 * factors.b_OR)})
    assert [found.kind for found in hub.add(odd, description="code", anomalies="quarantine").anomalies] == ["norm"]
    copy = hub.add(adapter(3), name="copy", description="code", anomalies={"duplicate": "quarantine"})
    assert [(found.kind, found.score) for found in copy.anomalies] == [("duplicate", 1.0)]
    with opened(place) as other:
        retriever = Retriever(other, embedder="hashing")
        assert {found.name for found in retriever.candidates("code", k=99)} == {f"adapter {seed}" for seed in range(13)}
        assert (len(other), [record.name for record in other.records(quarantined=True)]) == (13, ["adapter 20", "copy"])
        other.release("copy")
        assert "copy" in {found.name for found in retriever.candidates("code", k=99)}
        other.remove("adapter 20")
        assert (len(other), other.records(quarantined=True)) == (14, [])
        assert other.verify().problems == ()


def test_a_flipped_byte_is_found_on_reading_and_by_verify_and_adding_again_heals_it(hub):
    for seed in range(3):
        hub.add(adapter(seed))
    assert hub.verify().ok
    content = hub.record("adapter 1").hash
    damage(hub, content)
    with pytest.raises(AdapterCorrupt, match=rf"'adapter 1'.*{content}.*sha256 is [0-9a-f]{{64}}, not [0-9a-f]{{64}}"):
        hub["adapter 1"]
    report = hub.verify()
    assert len(report.problems) == 1
    assert report.intact == ("adapter 0", "adapter 2")
    assert same(hub["adapter 0"], adapter(0))
    hub.add(adapter(1))
    assert hub.verify().ok
    assert same(hub["adapter 1"], adapter(1))


def test_many_are_added_in_batches_and_again_without_a_second_copy(place, hub):
    added = hub.add_many([adapter(1), adapter(2), adapter(1, "twin"), adapter(3, "not a\nname")])
    assert [record.name for record in added.records] == ["adapter 1", "adapter 2", "twin"]
    assert len(added.refused) == 1
    with opened(place) as other:
        assert same(other["twin"], adapter(1))
        assert len(list(other._blobs.names())) == 2
        generation = other.generation
        assert len(other.add_many([adapter(1), adapter(2)]).records) == 2
        assert other.generation == generation
        assert other.verify().ok


def test_filters_pass_the_same_adapters(hub):
    hub.add(adapter(0), license="MIT", tags=["a", "b", "ß ?"])
    hub.add(adapter(1), license="MIT OR GPL-3.0-only", tags=["a"])
    hub.add(adapter(2), base_model="org/other", license="Apache-2.0")
    for options, wanted in [
        ({"tags": "a"}, [0, 1]),
        ({"tags": ["a", "ß ?"]}, [0]),
        ({"license": []}, []),
        ({"license": "mit"}, [0, 1]),
        ({"license": ["GPL-3.0-only", "Apache-2.0"]}, [1, 2]),
        ({"base_model": "org/other"}, [2]),
        ({"base_model": "org/none"}, []),
        ({"base_model": "org/base", "tags": "b", "license": "MIT"}, [0]),
    ]:
        assert [record.name for record in hub.records(**options)] == [f"adapter {seed}" for seed in wanted], options
        found = Retriever(hub, embedder="hashing").candidates("adapter", **options)
        assert sorted(candidate.name for candidate in found) == [f"adapter {seed}" for seed in wanted], options
    hub.update("adapter 0", tags=[])
    assert [record.name for record in hub.records(tags="a")] == ["adapter 1"]


def test_a_missing_blob_is_named(hub):
    stored = hub.add(adapter(1))
    hub._blobs.remove(stored.hash)
    with pytest.raises(AdapterCorrupt, match=r"'adapter 1'.*is missing"):
        hub["adapter 1"]
    assert len(hub.verify().problems) == 1


def test_gc_deletes_exactly_what_no_row_names_and_says_how_much(hub):
    kept, gone = hub.add(adapter(1)), hub.add(adapter(2))
    mapped = hub["adapter 2"]
    hub.remove("adapter 2")
    assert hub.verify().orphans == (gone.hash,)
    assert hub.gc() == gone.size_bytes > 0
    assert list(hub._blobs.names()) == [kept.hash]
    assert hub.verify().orphans == ()
    assert hub.gc() == 0
    assert same(mapped, adapter(2))
    assert same(hub["adapter 1"], adapter(1))


def test_a_row_changed_behind_the_hubs_back_is_never_believed(hub):
    for seed in range(2):
        hub.add(adapter(seed))
    with hub._catalogue.writing("damaging") as connection:
        connection.execute(
            "UPDATE adapters SET record = replace(record, 'org/base', 'org/evil') WHERE name = ?", ("adapter 1",)
        )
    with pytest.raises(HubCorrupt, match="sha256"):
        list(hub)
    assert hub.verify().intact == ("adapter 0",)
    with pytest.raises(HubCorrupt):
        hub.gc()
    assert same(hub["adapter 0"], adapter(0))


def test_a_change_that_fails_half_way_changes_nothing(hub):
    hub.add(adapter(0))
    before, generation = list(hub), hub.generation

    def fail():
        with hub._catalogue.writing("failing") as connection:
            connection.execute("DELETE FROM adapters")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (list(hub), hub.generation) == (before, generation)
    assert hub.verify().ok


def test_a_closed_hub_says_so(hub):
    hub.close()
    hub.close()
    with pytest.raises(HubError, match="is closed"):
        len(hub)


def test_files_beside_the_weights_are_stored_once_given_back_and_collected(hub):
    files = {"tokenizer.json": b'{"a": 1}', "chat_template.jinja": b"{{ messages }}"}
    for seed in (0, 1):
        hub.add(replace(adapter(seed), files=files))
    assert len(list(hub._blobs.names())) == 4
    assert dict(hub["adapter 0"].files) == files
    found = hub.verify()
    assert (found.ok, found.orphans) == (True, ())
    hub.remove("adapter 0")
    hub.gc()
    assert dict(hub["adapter 1"].files) == files
    hub.remove("adapter 1")
    hub.gc()
    assert list(hub._blobs.names()) == []


def test_a_composition_comes_back_also_through_another_opening_and_its_files_go_when_it_is_gone(place, hub):
    stored = hub.save_composition("ä: kept", Saved("old"))
    with opened(place) as second:
        found = second.composition("ä: kept")
        assert (found.hash, found.report, found.read("below/weights")) == (stored.hash, {"chosen": "old"}, bytes(range(256)))
        with pytest.raises(AdapterExists):
            second.save_composition("ä: kept", Saved("new"))
        second.save_composition("ä: kept", Saved("new"), replace=True)
    assert [each.report for each in hub.compositions()] == [{"chosen": "new"}]
    assert hub.verify().ok
    hub.remove_composition("ä: kept")
    hub.gc()
    assert (hub.compositions(), list(hub._blobs.names())) == ([], [])
