"""The key that compares a query with tasks, on texts that are angles: every number follows from a cosine."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loraweave.errors import RetrievalError
from loraweave.extensions.retrieval_keys.keys.validation import Validation, _score
from loraweave.retrieval.query import Query
from loraweave.types import Record


def test_validation_is_the_mean_score_over_tasks_weighted_by_their_likeness(score):
    key = Validation(tasks={"near": ["10"], "far": ["60"], "unscored": ["0"]}, temperature=0.5)
    weights = [math.exp(math.cos(math.radians(angle)) / 0.5) for angle in (10, 60)]
    expected = (0.9 * weights[0] + 0.1 * weights[1]) / sum(weights)
    found = score(key, Query(("0",)), "45", task_scores={"near": 0.9, "far": 0.1, "other": 1.0})
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value", [True, "0.9", 7, -1, None])
def test_scores_that_are_none_are_no_opinion(score, value):
    assert np.isnan(score(Validation(tasks={"near": ["10"]}), Query(("0",)), "45", task_scores={"near": value}))


def test_a_score_that_is_not_a_number_is_no_opinion():
    record = Record("one", "", "base", 1, (), None, (), "", 0, "", card={"task_scores": {"near": math.nan}})
    assert math.isnan(_score(record, "near"))


def test_a_temperature_without_a_meaning_is_refused():
    with pytest.raises(RetrievalError, match=r"key 'validation' got temperature=0\.0"):
        Validation(temperature=0.0)
