from __future__ import annotations

import gc
import logging
import math
import subprocess
import sys
import weakref

import joblib
import numpy as np
import pytest
import tiny_hubs
from counted_words import Counts

from loraweave import registry
from loraweave.errors import DimensionMismatch, HubReadOnly, RetrievalError, UnknownName
from loraweave.hub.hub import Hub
from loraweave.hub.search import keys as keys_module
from loraweave.hub.search import search as search_module
from loraweave.hub.search.keys import DESCRIPTION_WEIGHT, MAX_SAMPLE_INPUTS
from loraweave.hub.search.search import SearchIndex, checked_count
from loraweave.hub.tables.filtering import Filters


def adapter(name, base_model="base"):
    return tiny_hubs.adapter(0, name, base_model=base_model)


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as opened:
        opened.add(adapter("pets"), examples=["cat", "cat dog"], description="film", tags=["animal"], license="MIT")
        opened.add(adapter("adding"), examples=["sum", "sum"])
        opened.add(adapter("cinema", "other"), description="film film cat", license="Apache-2.0", language="de")
        opened.add(adapter("word"))
        yield opened


def found(index, text, k=10, min_score=None, **filters):
    query_QD = index.embed([text])
    return index.explain(query_QD[0], index.hits(query_QD, k, Filters(**filters), min_score=min_score)[0])


def scores(candidates):
    return {candidate.name: candidate.score for candidate in candidates}


class Fussy(Counts):
    """Cannot read of one adapter."""

    def embed(self, texts):
        if "sum" in texts:
            raise RetrievalError("sum is no word")
        return super().embed(texts)


@pytest.mark.usefixtures("warm_workers")
def test_workers_make_the_keys_of_one_process_and_keep_those_beside_a_failure(hub, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(keys_module, "NUM_SPREAD", 1)
    index = SearchIndex(hub, embedder=Fussy())
    with joblib.parallel_config(n_jobs=2), pytest.raises(RetrievalError, match="sum is no word") as raised:
        found(index, "cat")
    assert raised.value.__notes__ == ["this was piece 'adding' of 4; the same call runs what failed again"]
    kept = hub.vectors(Counts().id)
    assert sorted(kept) == ["cinema", "pets", "word"]
    found(SearchIndex(hub, embedder=Counts()), "cat")
    alone = hub.vectors(Counts().id)
    assert len(alone) == 4
    with Hub(tmp_path / "again") as again:
        for record in hub:
            again.add(hub[record.name], examples=record.examples, description=record.description)
        found(SearchIndex(again, embedder=Counts()), "cat")
        made = again.vectors(Counts().id)
    assert {name: (digest, key_D.tolist()) for name, (digest, key_D) in alone.items()} == {
        name: (digest, key_D.tolist()) for name, (digest, key_D) in made.items()
    }
    # a bar is for a terminal
    assert capfd.readouterr().out == ""


def test_a_key_is_the_unit_mean_of_sample_inputs_with_the_description_mixed_in(hub):
    root = math.sqrt(0.5)
    mean = np.array([(1 + root) / 2, root / 2])
    mean /= np.linalg.norm(mean)
    length = math.sqrt(1 + DESCRIPTION_WEIGHT**2)
    index = SearchIndex(hub, embedder=Counts())
    for word, want in (("cat", mean[0] / length), ("dog", mean[1] / length), ("film", DESCRIPTION_WEIGHT / length)):
        assert scores(found(index, word))["pets"] == pytest.approx(want, abs=1e-6)


def test_an_adapter_without_sample_inputs_is_found_by_its_description(hub):
    assert scores(found(SearchIndex(hub, embedder=Counts()), "film"))["cinema"] == pytest.approx(2 / math.sqrt(5), abs=1e-6)


def test_an_adapter_without_any_text_is_found_by_its_name(hub):
    assert scores(found(SearchIndex(hub, embedder=Counts()), "word")) == {"word": 1, "pets": 0, "adding": 0, "cinema": 0}


def test_how_alike_the_sample_inputs_are_does_not_count(tmp_path):
    with Hub(tmp_path) as hub:
        hub.add(adapter("wide"), examples=["cat", "dog"])
        hub.add(adapter("narrow"), examples=["cat dog", "dog cat"])
        assert scores(found(SearchIndex(hub, embedder=Counts()), "cat dog")) == {"wide": 1.0, "narrow": 1.0}


def test_equal_scores_keep_the_order_of_addition(tmp_path):
    names = ["zeta", "alpha", "Mid", "beta"]
    with Hub(tmp_path) as hub:
        for name in names:
            hub.add(adapter(name), examples=["cat"])
        index = SearchIndex(hub, embedder=Counts())
        assert [c.name for c in found(index, "cat")] == names
        assert [c.name for c in found(index, "cat", k=2)] == names[:2]


@pytest.mark.parametrize(
    ("text", "name", "evidence"),
    [
        ("cat dog", "pets", "sample input 'cat dog' (1.00)"),
        ("cat", "pets", "sample input 'cat' (1.00)"),
        ("film", "pets", "description 'film' (1.00)"),
        ("word", "word", "name 'word' (1.00)"),
    ],
)
def test_evidence_is_the_adapters_own_text_that_is_nearest(hub, text, name, evidence):
    candidates = found(SearchIndex(hub, embedder=Counts()), text)
    assert next(c for c in candidates if c.name == name).evidence == evidence


def test_evidence_of_a_long_text_is_one_short_line(tmp_path):
    with Hub(tmp_path) as hub:
        hub.add(adapter("long"), examples=["cat\n\n" + "and so on " * 100])
        evidence = found(SearchIndex(hub, embedder=Counts()), "cat")[0].evidence
    assert evidence.startswith("sample input 'cat and so on")
    assert evidence.endswith(" ...' (1.00)")
    assert len(evidence) < 90


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({"base_model": "other"}, ["cinema"]),
        ({"license": "mit"}, ["pets"]),
        ({"license": ["MIT", "Apache-2.0"]}, ["pets", "cinema"]),
        ({"tags": ["animal"]}, ["pets"]),
        ({"tags": ["animal"], "base_model": "other"}, []),
        ({"language": "DE"}, ["cinema"]),
        ({"language": ("xx",)}, []),
        ({"max_rank": 0}, []),
        ({"license": "GPL-3.0"}, []),
    ],
)
def test_filters_keep_what_fits_them_even_below_the_best(hub, filters, names):
    assert sorted(c.name for c in found(SearchIndex(hub, embedder=Counts()), "sum", k=2, **filters)) == sorted(names)


def test_candidates_below_the_threshold_are_left_out(hub):
    index = SearchIndex(hub, embedder=Counts())
    assert [c.name for c in found(index, "sum", min_score=0.5)] == ["adding"]
    assert found(index, "nothing known", min_score=0.5) == []


def test_what_was_added_changed_renamed_or_removed_counts_from_the_next_search(hub):
    index = SearchIndex(hub, embedder=Counts())
    assert found(index, "dog", k=1)[0].name == "pets"
    hub.add(adapter("dogs"), examples=["dog"])
    assert found(index, "dog", k=1)[0].name == "dogs"
    hub.rename("dogs", "hounds")
    assert found(index, "dog", k=1)[0].name == "hounds"
    hub.update("hounds", examples=["sum"])
    assert found(index, "dog", k=1)[0].name == "pets"
    hub.remove("pets")
    assert "pets" not in scores(found(index, "dog"))


def test_keys_are_stored_once_and_read_by_the_next_search(hub):
    first, second = Counts(), Counts()
    before = found(SearchIndex(hub, embedder=first), "cat", k=1)
    again = SearchIndex(hub, embedder=second)
    assert scores(again_hits := found(again, "cat", k=1)) == scores(before)
    # the query alone: the texts of the one adapter found were embedded for the evidence of the search before
    assert again_hits[0].name == "pets"
    assert second.seen == ["cat"]
    # and of another adapter only its own, for its evidence
    assert found(again, "film", k=1)[0].name == "cinema"
    assert "sum" not in second.seen


def test_only_the_adapter_whose_texts_changed_is_embedded_again(hub):
    first, second = Counts(), Counts()
    found(SearchIndex(hub, embedder=first), "cat")
    first.seen.clear()
    hub.update("adding", examples=["sum dog"])
    SearchIndex(hub, embedder=second).hits(np.zeros((1, 5)), 4)
    # by either: what an embedder of the same kind made of a hub's own texts is shared
    assert first.seen + second.seen == ["sum dog"]


def test_vectors_of_another_embedder_are_not_used(hub):
    found(SearchIndex(hub, embedder=Counts("one")), "cat")
    other = Counts("two")
    SearchIndex(hub, embedder=other).hits(np.zeros((1, 5)), 4)
    assert {"cat", "cat dog", "film", "sum", "film film cat", "word"} <= set(other.seen)


def test_a_hub_that_cannot_be_written_is_searched_and_embeds_once(hub, monkeypatch):
    def refuse(embedder_id, rows):
        raise HubReadOnly("the folder cannot be written")

    monkeypatch.setattr(hub, "store_vectors", refuse)
    embedder = Counts()
    index = SearchIndex(hub, embedder=embedder)
    assert found(index, "sum", k=1)[0].name == "adding"
    hub.update("pets", tags=["other"])
    embedder.seen.clear()
    index.hits(np.zeros((1, 5)), 4)
    assert embedder.seen == []


def test_at_most_fifty_sample_inputs_are_embedded(tmp_path):
    with Hub(tmp_path) as hub:
        hub.add(adapter("many"), examples=[f"cat {i}" for i in range(MAX_SAMPLE_INPUTS + 30)])
        embedder = Counts()
        SearchIndex(hub, embedder=embedder).hits(np.zeros((1, 5)), 1)
    assert len(embedder.seen) == MAX_SAMPLE_INPUTS == 50


def test_blank_sample_inputs_and_descriptions_count_as_none(tmp_path):
    with Hub(tmp_path) as hub:
        hub.add(adapter("word"), examples=["", "  "], description="\n")
        assert found(SearchIndex(hub, embedder=Counts()), "word")[0].evidence == "name 'word' (1.00)"


@pytest.mark.parametrize("index", [*registry.names("indexes"), "auto"])
def test_every_index_gives_the_same_candidates(hub, index):
    want = found(SearchIndex(hub, embedder=Counts(), index="flat"), "cat dog film")
    assert found(SearchIndex(hub, embedder=Counts(), index=index), "cat dog film") == want


def test_an_embedding_that_is_not_finite_is_named_with_its_text(hub):
    embedder = Counts()
    embedder.embed = lambda texts: np.full((len(texts), 5), np.nan)
    with pytest.raises(DimensionMismatch, match=r"'counts'.*not finite.*text 1 of 1: 'cat'"):
        SearchIndex(hub, embedder=embedder).embed(["cat"])


def test_an_embedding_of_another_size_is_named_with_both_shapes(hub):
    embedder = Counts()
    embedder.embed = lambda texts: np.ones((len(texts), 3))
    with pytest.raises(DimensionMismatch, match=r"shape \(1, 3\) instead of \(1, 5\)"):
        SearchIndex(hub, embedder=embedder).embed(["cat"])


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_an_empty_query_is_refused(hub, text):
    with pytest.raises(RetrievalError, match="query 2 of 2 is empty"):
        SearchIndex(hub, embedder=Counts()).embed(["cat", text])


def test_a_misspelt_embedder_or_index_answers_with_the_nearest_name(hub):
    with pytest.raises(UnknownName, match="did you mean 'hashing'"):
        SearchIndex(hub, embedder="hashin")
    with pytest.raises(UnknownName, match="did you mean 'flat'"):
        SearchIndex(hub, embedder="hashing", index="flta")


@pytest.mark.parametrize("k", [-1, 1.0, "3", None, True, np.float64(2)])
def test_a_count_that_is_no_whole_number_of_zero_or_more_is_refused(k):
    with pytest.raises(RetrievalError, match="k is "):
        checked_count(k)


def test_a_numpy_integer_is_a_count():
    assert checked_count(np.int32(3)) == 3


@pytest.fixture
def by_counts(monkeypatch):
    """hub.search with the embedder of this file."""
    monkeypatch.setattr(registry, "get", _registry_with_counts(registry.get))


def _registry_with_counts(get):
    return lambda folder, name: Counts if (folder, name) == ("embedders", "sentence") else get(folder, name)


def test_hub_search_gives_candidates_with_score_evidence_and_record(hub, by_counts):
    (best,) = hub.search("sum", k=1)
    assert (best.name, best.score, best.evidence) == ("adding", 1.0, "sample input 'sum' (1.00)")
    assert best.record == hub.record("adding")


def test_hub_search_gives_nothing_for_k_zero_or_when_nothing_reaches_the_threshold(hub, by_counts):
    assert hub.search("sum", k=0) == []
    assert hub.search("nothing known", min_score=0.1) == []


@pytest.mark.parametrize("min_score", [float("nan"), float("inf"), 10**400, "0.5"])
def test_a_threshold_that_is_no_finite_number_is_refused(hub, by_counts, min_score):
    with pytest.raises(RetrievalError, match="min_score is "):
        hub.search("sum", min_score=min_score)


def test_hub_search_takes_one_text(hub, by_counts):
    with pytest.raises(RetrievalError, match="must be one text, not list"):
        hub.search(["sum", "cat"])


def test_an_empty_hub_finds_nothing_and_says_how_to_fill_it(tmp_path, by_counts, caplog):
    with Hub(tmp_path) as empty, caplog.at_level(logging.INFO, "loraweave.hub.search.search"):
        assert empty.search("sum") == []
    assert "hub.add(" in caplog.text


def test_hub_search_embeds_the_hub_once(hub, by_counts):
    hub.search("sum")
    shared = search_module._SHARED[hub]
    hub.search("cat")
    assert search_module._SHARED[hub] is shared
    assert shared.embedder.seen.count("cat dog") == 1


def test_a_search_does_not_keep_the_hub_alive(tmp_path, by_counts):
    hub = Hub(tmp_path)
    hub.search("sum")
    gone = weakref.ref(hub)
    hub.close()
    del hub
    gc.collect()
    assert gone() is None


def test_searching_by_name_needs_neither_torch_nor_transformers():
    code = (
        "import sys, loraweave.hub.search.search, loraweave.retrieval.retriever as r; from loraweave import registry; "
        "registry.get('embedders', 'sentence')(); registry.get('indexes', 'flat')(3); "
        "print(sorted({'torch', 'transformers', 'faiss'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def written(monkeypatch, tmp_path):
    """The folder of embedded texts, of a cache of its own."""
    monkeypatch.setenv("LORAWEAVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "texts"


def test_texts_that_an_earlier_process_embedded_are_read(written):
    counts = Counts()
    first = search_module.kept_on_disk(counts, ("cat", "dog"))
    assert counts.seen == ["cat", "dog"]
    np.testing.assert_array_equal(search_module.kept_on_disk(counts, ("cat", "dog")), first)
    assert counts.seen == ["cat", "dog"]
    search_module.kept_on_disk(counts, ("cat", "sum"))
    assert counts.seen == ["cat", "dog", "cat", "sum"]


@pytest.mark.parametrize("damage", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_a_damaged_file_of_embedded_texts_is_made_again(written, damage):
    first = search_module.kept_on_disk(Counts(), ("cat",))
    [file] = written.iterdir()
    file.unlink()
    file.write_bytes(damage)
    np.testing.assert_array_equal(search_module.kept_on_disk(Counts(), ("cat",)), first)
    np.testing.assert_array_equal(np.load(file), first)


def test_the_oldest_files_of_embedded_texts_go_when_there_are_too_many(written, monkeypatch):
    monkeypatch.setattr(search_module, "NUM_EVIDENCE_CACHED", 4)
    for number in range(30):
        search_module.kept_on_disk(Counts(), ("cat " * number,))
        assert len(list(written.iterdir())) <= 4
    counts = Counts()
    search_module.kept_on_disk(counts, ("cat " * 29,))
    assert not counts.seen


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORAWEAVE_CACHE", str(tmp_path / "file"))
    assert search_module.kept_on_disk(Counts(), ("cat",)).shape == (1, Counts().dim)
