"""Searches by keys, examples and pages, and the threshold below which nothing is found."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from loraweave import registry
from loraweave.errors import AdapterNotFound, DimensionMismatch, InvalidTask, RetrievalError, UnknownName
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.retrieval.fusion import Abstention, Fusion
from loraweave.retrieval.retriever import Retriever
from loraweave.types import Factors


def add(hub, name, angle, rank=1, **card):
    layers = {"layer": Factors(torch.ones(rank, 3), torch.ones(2, rank))}
    hub.add(Adapter(name, "base", layers, card=card), examples=[str(angle)])


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path) as hub:
        for number, angle in enumerate((40, 0, 20, 60, 80)):
            add(hub, f"at {angle}", angle, rank=number + 1, language=["en", "FR"] if angle < 30 else "de")
        yield hub


def names(candidates):
    return [candidate.name for candidate in candidates]


def test_pages_that_follow_each_other_are_the_whole_list(hub, plane):
    retriever = Retriever(hub, embedder=plane, keys=())
    whole = retriever.candidates("10")
    found, after = [], None
    while page := retriever.candidates("10", k=2, after=after):
        found += page
        after = page[-1]
    assert found == whole


@pytest.mark.parametrize("keys", [(), ("mean",)])
def test_a_page_neither_repeats_nor_loses_when_adapters_come_and_go(hub, keys, plane):
    retriever = Retriever(hub, embedder=plane, keys=keys)
    first = retriever.candidates("0", k=2)
    assert names(first) == ["at 0", "at 20"]
    add(hub, "better", 1)
    hub.remove("at 20")
    add(hub, "worse", 50)
    assert names(retriever.candidates("0", k=2, after=first[-1])) == ["at 40", "worse"]


def test_equal_scores_are_paged_in_order_of_addition(hub, plane):
    for number in range(5):
        add(hub, f"twin {number}", 0, rank=number + 6)
    retriever = Retriever(hub, embedder=plane, keys=())
    found, after = [], None
    for _ in range(3):
        page = retriever.candidates("0", k=2, after=after)
        found, after = found + names(page), page[-1]
    assert found == ["at 0", *(f"twin {number}" for number in range(5))]


def test_paging_and_diversity_together_are_refused(hub, plane):
    retriever = Retriever(hub, embedder=plane)
    after = retriever.candidates("0", k=1)[0]
    with pytest.raises(RetrievalError, match=r"by score, which diversity=0\.5 does not keep"):
        retriever.candidates("0", after=after, diversity=0.5)


@pytest.mark.parametrize("keys", [(), ("mean",)])
def test_filters_of_rank_size_and_language_pass_the_best_that_fit(hub, keys, plane):
    retriever = Retriever(hub, embedder=plane, keys=keys)
    assert names(retriever.candidates("0", max_rank=3)) == ["at 0", "at 20", "at 40"]
    assert names(retriever.candidates("0", k=1, language="de")) == ["at 40"]
    assert names(retriever.candidates("0", language=("fr", "es"))) == ["at 0", "at 20"]
    size = hub.record("at 40").size_bytes
    assert names(retriever.candidates("0", max_size_bytes=size)) == ["at 40"]
    assert names(retriever.for_task(["0"], max_rank=1)) == ["at 40"]
    assert names(retriever.like("at 0", max_rank=1)) == ["at 40"]
    assert retriever.candidates("0", language="xx") == []


def test_a_filter_that_passes_only_the_last_of_many_finds_it(tmp_path, plane):
    with Hub(tmp_path) as hub:
        for angle in range(150):
            add(hub, str(angle), angle, rank=1 if angle == 140 else 2)
        assert names(Retriever(hub, embedder=plane, keys=()).candidates("0", k=1, max_rank=1)) == ["140"]


@pytest.mark.parametrize("limit", [-1, 1.5, True, "2"])
def test_a_limit_that_is_no_count_is_refused(hub, limit, plane):
    with pytest.raises(RetrievalError, match="max_rank is "):
        Retriever(hub, embedder=plane).candidates("0", max_rank=limit)


def test_outputs_tell_adapters_of_the_same_inputs_apart(tmp_path, cosine, plane):
    with Hub(tmp_path) as hub:
        add(hub, "plus thirty", 10, outputs=["40"])
        add(hub, "plus sixty", 10, outputs=["70"])
        retriever = Retriever(hub, embedder=plane, keys=())
        assert [c.score for c in retriever.candidates("12")] == [cosine(2)] * 2
        for shift, best in ((30, "plus thirty"), (60, "plus sixty")):
            found = retriever.for_examples([("12", str(12 + shift)), ("8", str(8 + shift))])
            assert found[0].name == best
            assert "outputs 1.00" in found[0].evidence


def test_the_score_of_examples_is_the_weighted_mean_of_the_keys(tmp_path, plane):
    with Hub(tmp_path) as hub:
        add(hub, "one", 10, outputs=["50"])
        retriever = Retriever(hub, embedder=plane, keys=("mean", "outputs"), fusion=Fusion("mean", {"outputs": 3.0}))
        (found,) = retriever.for_examples([("30", "60")])
        expected = (math.cos(math.radians(20)) + 3 * math.cos(math.radians(10))) / 4
        assert found.score == pytest.approx(expected, abs=2e-6)
        assert found.evidence == "mean 0.94, outputs 0.98; sample input '10' (0.94)"


def test_a_description_counts_in_a_search_by_examples(tmp_path, plane):
    with Hub(tmp_path) as hub:
        for name, text in (("one", "0"), ("two", "90")):
            add(hub, name, 10)
            hub.update(name, description=text)
        retriever = Retriever(hub, embedder=plane, keys=())
        assert names(retriever.for_examples([("10", "x")], description="80", k=1)) == ["two"]
        assert names(retriever.for_examples([("10", "x")], description="20", k=1)) == ["one"]


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ([], RetrievalError, "at least one"),
        (["10"], InvalidTask, "example 1 is '10'"),
        ([("1", "2"), ("1", 2)], InvalidTask, "example 2 is"),
        ([("", "2")], RetrievalError, "query 1 of 1 is empty"),
    ],
)
def test_examples_that_are_no_pairs_of_texts_are_refused(hub, examples, error, message, plane):
    with pytest.raises(error, match=message):
        Retriever(hub, embedder=plane).for_examples(examples)


def test_an_example_with_an_empty_output_counts_by_its_input_alone(tmp_path, plane):
    with Hub(tmp_path) as hub:
        add(hub, "one", 10, outputs=["50"])
        hub.update("one", description="30")
        retriever = Retriever(hub, embedder=plane, keys=("mean", "outputs", "description"))
        (found,) = retriever.for_examples([("30", "60"), ("10", ""), ("20", " \n")])
        # the inputs' mean points to 20, the only output is 60, and inputs and outputs together point to 30
        space = [math.cos(math.radians(angle)) for angle in (10, 10)]
        together = sum(math.cos(math.radians(angle - 30)) for angle in (30, 10, 20, 60))
        across = sum(math.sin(math.radians(angle - 30)) for angle in (30, 10, 20, 60))
        assert found.score == pytest.approx((sum(space) + together / math.hypot(together, across)) / 3, abs=2e-6)
        related = Retriever(hub, embedder=plane, keys=("relation",))
        assert related.for_examples([("a b", "B A"), ("c", "")])[0].score == related.for_examples([("a b", "B A")])[0].score


def test_a_search_by_the_mean_key_finds_what_the_index_finds(hub, plane):
    plain, keyed = Retriever(hub, embedder=plane, keys=()), Retriever(hub, embedder=plane, keys=("mean",))
    for text in ("10", "70", "200"):
        assert names(plain.candidates(text)) == names(keyed.candidates(text))
        np.testing.assert_allclose(
            [c.score for c in plain.candidates(text)], [c.score for c in keyed.candidates(text)], atol=2e-6
        )
    assert keyed.candidates(["10", "70"], k=2) == [keyed.candidates("10", k=2), keyed.candidates("70", k=2)]
    assert names(keyed.candidates("10", k=2, diversity=1.0)) == names(plain.candidates("10", k=2, diversity=1.0))


def test_only_the_shortlist_is_scored_by_keys(hub, plane):
    assert len(Retriever(hub, embedder=plane, keys=("mean",), shortlist=2).candidates("10")) == 2
    for shortlist in (0, True):
        with pytest.raises(RetrievalError, match="shortlist is"):
            Retriever(hub, embedder=plane, shortlist=shortlist)


def test_a_misspelled_key_is_found_out_at_once(hub, plane):
    with pytest.raises(UnknownName, match="did you mean 'outputs'"):
        Retriever(hub, embedder=plane, keys=("output",))


def test_below_the_calibrated_threshold_the_base_model_is_the_answer(hub, plane):
    retriever = Retriever(hub, embedder=plane, keys=())
    found = retriever.calibrate(["1", "19", "41"], ["120", "130", "140", "100"], false_accept=0.25)
    # the best adapter is at 80 degrees: 40 degrees from 120, which must not pass, and 20 from 100, which may
    assert found.threshold == pytest.approx(math.cos(math.radians(40)) + 1e-6, abs=2e-6)
    assert (found.accept, found.false_accept) == (1.0, 0.25)
    assert retriever.candidates("125") == []
    assert names(retriever.candidates("100", k=1)) == ["at 80"]
    assert retriever.candidates(["125", "100"], k=1)[0] == []
    assert retriever.for_task(["125"]) == []


def test_a_threshold_for_another_search_is_refused(hub, tmp_path, plane):
    threshold = Retriever(hub, embedder=plane, keys=()).calibrate(["1"], ["120"])
    threshold.save(tmp_path / "threshold.json")
    loaded = Abstention.load(tmp_path / "threshold.json")
    assert Retriever(hub, embedder=plane, abstention=loaded).candidates("150") == []
    with pytest.raises(RetrievalError, match="calibrated for searches by 'plane', but this one is by 'plane keys mean"):
        Retriever(hub, embedder=plane, keys=("mean",), abstention=loaded).candidates("1")
    assert dataclasses.asdict(loaded) == dataclasses.asdict(threshold)


def test_a_calibration_that_fails_leaves_the_threshold_as_it_was(hub, plane):
    retriever = Retriever(hub, embedder=plane, keys=())
    before = retriever.calibrate(["1"], ["120"])
    for wrong in (["1", ""], []):
        with pytest.raises(RetrievalError):
            retriever.calibrate(wrong, ["120"])
    with pytest.raises(InvalidTask, match="the inputs: got the text '120' alone"):
        retriever.calibrate(["1"], "120")
    with pytest.raises(RetrievalError, match="inputs_per_query is 0"):
        retriever.calibrate(["1"], ["120"], inputs_per_query=0)
    assert retriever.abstention == before


def test_learned_weights_find_the_key_that_knows(tmp_path, plane):
    with Hub(tmp_path) as hub:
        for number in range(4):
            add(hub, f"task {number}", 10, outputs=[str(45 * number)])
        retriever = Retriever(hub, embedder=plane, keys=("mean", "outputs"))
        held_out = {f"task {n}": [(str(8 + i), str(45 * n + 2 * i - 4)) for i in range(5)] for n in range(4)}
        fusion = retriever.fit_fusion(held_out)
        assert fusion.weights["outputs"] > 1.0 > abs(fusion.weights["mean"])
        assert names(retriever.for_examples([("12", "93")], k=1)) == ["task 2"]
        with pytest.raises(AdapterNotFound):
            retriever.fit_fusion({"nobody": ["10"]})
        with pytest.raises(RetrievalError, match="no keys to weigh"):
            Retriever(hub, embedder=plane).fit_fusion(held_out)


def test_like_refuses_what_it_cannot_do(hub, plane):
    retriever = Retriever(hub, embedder=plane)
    with pytest.raises(AdapterNotFound):
        retriever.like("nobody")
    with pytest.raises(RetrievalError, match=r"diversity=0\.5 compares texts"):
        retriever.like("at 0", diversity=0.5)
    assert retriever.like("at 0", keys=("mean",)) == []


@pytest.mark.parametrize("keys", [("mean",), ("mean", "description")])
def test_an_empty_hub_finds_nothing(tmp_path, keys, plane):
    with Hub(tmp_path) as hub:
        retriever = Retriever(hub, embedder=plane, keys=keys)
        assert retriever.candidates("10") == []
        assert retriever.for_examples([("10", "20")]) == []


@pytest.mark.parametrize("text", ["x" * 1_000_000, "\x00\x01\x02", "lone \ud83d surrogate", "מבחן", "🦜" * 50])
def test_odd_texts_are_searched_by_every_text_key_like_any_other(tmp_path, text):
    # another reads weights
    keys = sorted(set(registry.names("keys")) - {"spectral"})
    with Hub(tmp_path) as hub:
        for angle in (1, 2):
            add(hub, f"at {angle}", angle, outputs=["y"])
        found = Retriever(hub, embedder="hashing", keys=keys).for_examples([(text, text)])
    assert len(found) == 2
    assert all(math.isfinite(candidate.score) for candidate in found)


@pytest.mark.parametrize("row", [[float("nan"), 1.0], [1.0, 0.0, 0.0]])
def test_an_embedder_that_breaks_its_word_is_named(hub, row, plane):
    class Broken(type(plane)):
        def embed(self, texts):
            return np.tile(np.array(row, dtype=np.float32), (len(texts), 1))

    with pytest.raises(DimensionMismatch, match="embedder 'plane' gave"):
        Retriever(hub, embedder=Broken(), keys=("mean",)).for_examples([("1", "2")])
