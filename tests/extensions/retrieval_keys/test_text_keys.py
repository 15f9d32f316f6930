"""The keys that compare texts in other ways, on texts that are angles: every number follows from a cosine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraweave.errors import RetrievalError
from loraweave.extensions.retrieval_keys.keys.discriminant import Discriminant
from loraweave.extensions.retrieval_keys.keys.prototypes import Prototypes, centres
from loraweave.extensions.retrieval_keys.keys.validation import Validation, _score
from loraweave.extensions.retrieval_keys.keys.voting import Voting
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.hub.search.search import SearchIndex
from loraweave.retrieval.keys.mean import Mean
from loraweave.retrieval.query import KeySpace, Query
from loraweave.types import Factors, Record


def test_the_nearest_samples_vote(score):
    expected = (math.cos(math.radians(5)) + math.cos(math.radians(10))) / 2
    assert score(Voting(nearest=2), Query(("0",)), "5", "10", "170") == pytest.approx(expected, abs=1e-6)


def test_votes_are_averaged_over_the_inputs(score):
    expected = (math.cos(0) + math.cos(math.radians(30))) / 2
    assert score(Voting(nearest=1), Query(("0", "30")), "0") == pytest.approx(expected, abs=1e-6)


def test_the_nearest_prototype_counts(score, cosine):
    query = Query(("91",))
    assert score(Prototypes(count=2), query, "0", "2", "90", "92") == cosine(0)
    assert score(Prototypes(count=1), query, "0", "2", "90", "92") == cosine(45)


def test_prototypes_are_the_means_of_clusters_and_no_more_than_there_are_different_samples(plane):
    found = centres(plane.embed(["0", "10", "180", "190"]).astype(np.float64), 2)
    angles = sorted(np.degrees(np.arctan2(found[:, 1], found[:, 0])) % 360)
    np.testing.assert_allclose(angles, [5, 185], atol=1e-4)
    assert len(centres(plane.embed(["7", "7", "7"]).astype(np.float64), 3)) == 1


def test_the_discriminant_counts_less_in_a_direction_in_which_samples_vary(tmp_path):
    rng = np.random.default_rng(0)

    class Given:
        dim, id = 2, "given"

        def __init__(self):
            self.rows = {}

        def embed(self, texts):
            return np.array([self.rows[text] for text in texts], dtype=np.float32).reshape(-1, 2)

    embedder = Given()
    with Hub(tmp_path) as hub:
        for name, centre in (("left", -1.0), ("right", 1.0)):
            texts = [f"{name} {n}" for n in range(40)]
            # the first coordinate tells the adapters apart, the second varies ten times as much within each
            rows = np.stack([centre + 0.1 * rng.standard_normal(40), rng.standard_normal(40)], axis=1)
            embedder.rows |= dict(zip(texts, rows, strict=True))
            hub.add(Adapter(name, "b", {"l": Factors(torch.ones(1, 3), torch.ones(2, 1))}), examples=texts)
        embedder.rows["query"] = np.array([0.5, 3.0])
        space = KeySpace(hub, SearchIndex(hub, embedder=embedder))
        records = hub.records()
        query = Query(("query",))
        left, right = Discriminant(shrinkage=0.01).scores(query, records, space)
        # written out: whitened by the pooled covariance around the mean of the means
        samples = [np.array([embedder.rows[text] for text in record.examples], dtype=np.float32) for record in records]
        means = np.array([rows.astype(float).mean(axis=0) for rows in samples])
        pooled = np.concatenate([rows - mean for rows, mean in zip(samples, means, strict=True)])
        covariance = pooled.T @ pooled / 78
        covariance = 0.99 * covariance + 0.01 * np.trace(covariance) / 2 * np.eye(2)
        root = np.linalg.cholesky(np.linalg.inv(covariance)).T
        keys, asked = (means - means.mean(axis=0)) @ root.T, root @ (np.array([0.5, 3.0]) - means.mean(axis=0))
        expected = keys @ asked / np.linalg.norm(keys, axis=1) / np.linalg.norm(asked)
        np.testing.assert_allclose([left, right], expected, atol=1e-6)
        plain = Mean().scores(query, records, space)
    assert right - left > plain[1] - plain[0]


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Voting(nearest=0), "key 'voting' got nearest=0"),
        (lambda: Prototypes(count=0), "key 'prototypes' got count=0"),
        (lambda: Discriminant(shrinkage=0.0), "key 'discriminant' got shrinkage=0.0"),
        (lambda: Validation(temperature=0.0), "key 'validation' got temperature=0.0"),
    ],
)
def test_settings_without_a_meaning_are_refused(make, message):
    with pytest.raises(RetrievalError, match=message):
        make()
