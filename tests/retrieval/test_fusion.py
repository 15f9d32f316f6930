from __future__ import annotations

import json

import numpy as np
import pytest

from loraweave.errors import RetrievalError
from loraweave.retrieval.fusion import Fusion, standardise

NAN = float("nan")


def test_the_mean_weighs_by_key_and_an_unnamed_key_by_one():
    parts = {"a": np.array([1.0, 0.0]), "b": np.array([0.0, 0.4])}
    np.testing.assert_allclose(Fusion("mean", {"a": 3.0}).fuse(parts), [0.75, 0.1])


def test_reciprocal_ranks_are_those_of_cormack_at_one_for_the_best():
    parts = {"a": np.array([0.9, 0.1, 0.5]), "b": np.array([5.0, 7.0, 6.0])}
    expected = [(61 / 61 + 61 / 63) / 2, (61 / 63 + 61 / 61) / 2, (61 / 62 + 61 / 62) / 2]
    np.testing.assert_allclose(Fusion("reciprocal_rank").fuse(parts), expected)


def test_equal_scores_share_a_rank():
    np.testing.assert_allclose(Fusion("reciprocal_rank").fuse({"a": np.array([0.5, 0.9, 0.5])}), [61 / 62, 1.0, 61 / 62])


@pytest.mark.parametrize("kind", ["mean", "reciprocal_rank", "logistic"])
def test_a_key_without_an_opinion_counts_as_average_and_an_adapter_without_any_has_no_score(kind):
    fusion = Fusion(kind, {"a": 1.0, "b": 1.0})
    found = fusion.fuse({"a": np.array([0.8, 0.2, NAN, NAN]), "b": np.array([NAN, NAN, 0.5, NAN])})
    assert found[0] > found[2] > found[1]
    assert np.isnan(found[3])
    assert np.isnan(fusion.fuse({"a": np.array([NAN, NAN])})).all()


def test_learned_weights_favour_the_key_that_is_right():
    rng = np.random.default_rng(0)
    searches = []
    for _ in range(200):
        right = int(rng.integers(5))
        good = rng.normal(size=5) * 0.3 + (np.arange(5) == right)
        searches.append(({"good": good, "noise": rng.normal(size=5)}, right))
    fusion = Fusion.fit(searches)
    assert fusion.kind == "logistic"
    assert fusion.weights["good"] > 2.0
    assert abs(fusion.weights["noise"]) < 0.5
    # the probability is that of the logistic model written out
    parts, _ = searches[0]
    z = standardise(parts) @ np.array([fusion.weights["good"], fusion.weights["noise"]]) + fusion.intercept
    np.testing.assert_allclose(fusion.fuse(parts), 1 / (1 + np.exp(-z)))


def test_standardised_scores_have_mean_zero_and_deviation_one_and_equal_ones_are_zero():
    rows = standardise({"a": np.array([1.0, 2.0, 3.0]), "b": np.array([4.0, 4.0, 4.0])})
    np.testing.assert_allclose(rows[:, 0], np.array([-1, 0, 1]) * np.sqrt(1.5))
    np.testing.assert_array_equal(rows[:, 1], 0.0)


def test_what_is_saved_is_read_back_and_is_json(tmp_path):
    fusion = Fusion("logistic", {"a": 1.25, "b": -0.5}, -3.0)
    fusion.save(tmp_path / "fusion.json")
    assert Fusion.load(tmp_path / "fusion.json") == fusion
    assert json.loads((tmp_path / "fusion.json").read_text())["weights"] == {"a": 1.25, "b": -0.5}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kind": "other", "weights": {}, "intercept": 0}',
        '{"kind": "mean", "weights": {"a": NaN}, "intercept": 0}',
    ],
)
def test_a_file_that_is_no_fusion_is_refused(tmp_path, text):
    (tmp_path / "fusion.json").write_text(text)
    with pytest.raises(RetrievalError, match="fusion"):
        Fusion.load(tmp_path / "fusion.json")


def test_weights_that_sum_to_nothing_and_searches_without_an_answer_are_refused():
    with pytest.raises(RetrievalError, match="sum to 0"):
        Fusion("mean", {"a": 0.0}).fuse({"a": np.array([1.0])})
    with pytest.raises(RetrievalError, match="from 0 searches"):
        Fusion.fit([])
    with pytest.raises(RetrievalError, match="from 1 searches"):
        Fusion.fit([({"a": np.array([1.0, 2.0])}, -1)])
