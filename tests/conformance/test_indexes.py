"""What every index promises, against inner products written out here; a new file is tested from the moment it exists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraweave import registry
from loraweave.errors import DimensionMismatch

NAMES = registry.names("indexes")


def unit_rows(seed, count, dim):
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def filled(name, vectors):
    index = registry.get("indexes", name)(vectors.shape[1])
    index.add(vectors)
    return index


def by_hand(query, vectors, k):
    """Python's sort over (-score, position), scores to six decimals."""
    scores = [round(sum(float(a) * float(b) for a, b in zip(query, row, strict=True)), 6) for row in vectors]
    order = sorted(range(len(scores)), key=lambda position: (-scores[position], position))[:k]
    return [scores[position] for position in order], order


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 33), dim=st.sampled_from([1, 3, 7, 32]), queries=st.integers(1, 4), k=st.integers(1, 40))
def test_results_equal_a_sort_of_all_inner_products(name, count, dim, queries, k):
    vectors, query = unit_rows(count, count, dim), unit_rows(1000 + count, queries, dim)
    scores, positions = filled(name, vectors).search(query, k)
    for row in range(queries):
        want_scores, want_positions = by_hand(query[row], vectors, k)
        np.testing.assert_allclose(scores[row], want_scores, atol=1e-6)
        assert positions[row].tolist() == want_positions


@pytest.mark.parametrize("name", NAMES)
def test_equal_scores_keep_the_order_of_addition(name):
    vectors = np.repeat(unit_rows(3, 4, 16), 5, axis=0)[np.random.default_rng(0).permutation(20)]
    for k in (1, 3, 7, 20):
        assert filled(name, vectors).search(vectors[:1], k)[1][0].tolist() == by_hand(vectors[0], vectors, k)[1]


@pytest.mark.parametrize("name", NAMES)
def test_noise_below_six_decimals_does_not_decide_between_equals(name):
    row = unit_rows(1, 1, 8)
    vectors = np.concatenate([row * np.float32(1 - 3e-8), row, row * np.float32(1 + 3e-8)])
    query = (row / np.float32(2)).astype(np.float32)
    assert filled(name, vectors).search(query, 1)[1].tolist() == [[0]]


@pytest.mark.parametrize("name", NAMES)
def test_k_above_the_count_gives_all(name):
    vectors = unit_rows(5, 6, 4)
    scores, positions = filled(name, vectors).search(vectors[:2], 10**9)
    assert scores.shape == positions.shape == (2, 6)
    assert sorted(positions[0].tolist()) == list(range(6))


@pytest.mark.parametrize("name", NAMES)
def test_k_zero_gives_nothing(name):
    scores, positions = filled(name, unit_rows(5, 6, 4)).search(unit_rows(6, 2, 4), 0)
    assert scores.shape == positions.shape == (2, 0)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_index_finds_nothing(name):
    scores, positions = registry.get("indexes", name)(4).search(unit_rows(6, 2, 4), 3)
    assert scores.shape == positions.shape == (2, 0)


@pytest.mark.parametrize("name", NAMES)
def test_no_queries_give_no_rows(name):
    assert filled(name, unit_rows(5, 6, 4)).search(np.empty((0, 4), dtype=np.float32), 3)[0].shape == (0, 3)


@pytest.mark.parametrize("name", NAMES)
def test_adding_in_parts_equals_adding_at_once(name):
    vectors, query = unit_rows(5, 9, 4), unit_rows(6, 3, 4)
    parts = filled(name, vectors[:2])
    parts.add(vectors[2:2])
    parts.add(vectors[2:])
    assert parts.search(query, 9)[1].tolist() == filled(name, vectors).search(query, 9)[1].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_vectors_of_another_size_are_refused_with_both_sizes(name):
    index = filled(name, unit_rows(5, 6, 4))
    with pytest.raises(DimensionMismatch, match=r"\(2, 5\).*4 numbers"):
        index.add(unit_rows(1, 2, 5))
    with pytest.raises(DimensionMismatch, match=r"\(2, 3\).*4 numbers"):
        index.search(unit_rows(1, 2, 3), 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_nothing_is_added(name, value):
    index, bad = filled(name, unit_rows(5, 6, 4)), unit_rows(1, 3, 4)
    bad[1, 2] = value
    with pytest.raises(DimensionMismatch, match=r"vectors \[1\] of 3"):
        index.add(bad)
    with pytest.raises(DimensionMismatch, match=r"queries \[1\] of 3"):
        index.search(bad, 2)
    assert index.search(unit_rows(5, 1, 4), 100)[1].shape == (1, 6)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_given_are_neither_changed_nor_referred_to(name):
    vectors = unit_rows(5, 6, 4)
    index, query = filled(name, vectors), unit_rows(7, 1, 4)
    before = index.search(query, 6)[1].tolist()
    vectors[:] = 0
    assert index.search(query, 6)[1].tolist() == before
