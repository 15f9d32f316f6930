"""What every index promises, against inner products written out here; a new file is tested from the moment it exists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import Properties

from loraweave import registry
from loraweave.errors import DimensionMismatch

PROPERTIES = Properties(registry.names("indexes"))


@pytest.mark.parametrize("name", PROPERTIES.entries)
def test_an_index_keeps_all_properties(name, request):
    PROPERTIES.walk(request, name)


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


@PROPERTIES.add()
@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 33), dim=st.sampled_from([1, 3, 7, 32]), queries=st.integers(1, 4), k=st.integers(1, 40))
def results_equal_a_sort_of_all_inner_products(name, count, dim, queries, k):
    vectors, query = unit_rows(count, count, dim), unit_rows(1000 + count, queries, dim)
    scores, positions = filled(name, vectors).search(query, k)
    for row in range(queries):
        want_scores, want_positions = by_hand(query[row], vectors, k)
        np.testing.assert_allclose(scores[row], want_scores, atol=1e-6)
        assert positions[row].tolist() == want_positions


@PROPERTIES.add()
def scores_are_inner_products_of_rows_as_given(name):
    index = filled(name, np.array([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]]))
    scores, positions = index.search(np.array([[0.0, 2.0]]), 3)
    np.testing.assert_allclose(scores, [[1.6, 0.0, 0.0]], atol=1e-6)
    assert positions.tolist() == [[1, 0, 2]]


@PROPERTIES.add()
def equal_scores_keep_the_order_of_addition(name):
    vectors = np.repeat(unit_rows(3, 4, 16), 5, axis=0)[np.random.default_rng(0).permutation(20)]
    for k in (1, 3, 7, 20):
        assert filled(name, vectors).search(vectors[:1], k)[1][0].tolist() == by_hand(vectors[0], vectors, k)[1]


@PROPERTIES.add()
def noise_below_six_decimals_does_not_decide_between_equals(name):
    row = unit_rows(1, 1, 8)
    vectors = np.concatenate([row * np.float32(1 - 3e-8), row, row * np.float32(1 + 3e-8)])
    query = (row / np.float32(2)).astype(np.float32)
    assert filled(name, vectors).search(query, 1)[1].tolist() == [[0]]


@PROPERTIES.add()
def k_above_the_count_gives_all(name):
    vectors = unit_rows(5, 6, 4)
    scores, positions = filled(name, vectors).search(vectors[:2], 10**9)
    assert scores.shape == positions.shape == (2, 6)
    assert sorted(positions[0].tolist()) == list(range(6))


@PROPERTIES.add(sizes=[(6, 2, 0), (0, 2, 3), (6, 0, 3)])
def k_zero_an_empty_index_and_no_queries_give_nothing(name, sizes):
    count, queries, k = sizes
    index = filled(name, unit_rows(5, count, 4))
    scores, positions = index.search(unit_rows(6, queries, 4), k)
    assert scores.shape == positions.shape == (queries, min(count, k))


@PROPERTIES.add()
def adding_in_parts_equals_adding_at_once(name):
    vectors, query = unit_rows(5, 9, 4), unit_rows(6, 3, 4)
    parts = filled(name, vectors[:2])
    parts.add(vectors[2:2])
    parts.add(vectors[2:])
    assert parts.search(query, 9)[1].tolist() == filled(name, vectors).search(query, 9)[1].tolist()


@PROPERTIES.add()
def vectors_of_another_size_are_refused_with_both_sizes(name):
    index = filled(name, unit_rows(5, 6, 4))
    with pytest.raises(DimensionMismatch, match=r"\(2, 5\).*4 numbers"):
        index.add(unit_rows(1, 2, 5))
    with pytest.raises(DimensionMismatch, match=r"\(2, 3\).*4 numbers"):
        index.search(unit_rows(1, 2, 3), 1)


@PROPERTIES.add(value=[np.nan, np.inf, -np.inf])
def values_that_are_not_finite_are_refused_and_nothing_is_added(name, value):
    index, bad = filled(name, unit_rows(5, 6, 4)), unit_rows(1, 3, 4)
    bad[1, 2] = value
    with pytest.raises(DimensionMismatch, match=r"vectors \[1\] of 3"):
        index.add(bad)
    with pytest.raises(DimensionMismatch, match=r"queries \[1\] of 3"):
        index.search(bad, 2)
    assert index.search(unit_rows(5, 1, 4), 100)[1].shape == (1, 6)


@PROPERTIES.add()
def vectors_given_are_neither_changed_nor_referred_to(name):
    vectors = unit_rows(5, 6, 4)
    index, query = filled(name, vectors), unit_rows(7, 1, 4)
    before = index.search(query, 6)[1].tolist()
    vectors[:] = 0
    assert index.search(query, 6)[1].tolist() == before


@PROPERTIES.add()
@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 60), allowed=st.integers(0, 60), queries=st.sampled_from([1, 2, 9]), k=st.integers(1, 40))
def with_a_mask_the_results_are_those_of_the_allowed_vectors_alone(name, count, allowed, queries, k):
    rng = np.random.default_rng(count * 61 + allowed)
    vectors, query = unit_rows(count, count, 7), unit_rows(1000 + count, queries, 7)
    mask = np.zeros(count, bool)
    mask[rng.permutation(count)[:allowed]] = True
    places = np.flatnonzero(mask)
    scores, positions = filled(name, vectors).search(query, k, allowed_N=mask)
    for row in range(queries):
        want_scores, want = by_hand(query[row], vectors[places], k)
        np.testing.assert_allclose(scores[row], want_scores, atol=1e-6)
        assert positions[row].tolist() == places[want].tolist()


@PROPERTIES.add()
def a_mask_of_another_length_is_refused_with_both(name):
    with pytest.raises(DimensionMismatch, match=r"\(5,\).*6 vectors"):
        filled(name, unit_rows(5, 6, 4)).search(unit_rows(6, 2, 4), 3, allowed_N=np.ones(5, bool))


def copies(index):
    """As a file gives them back: of the same bytes, and not to be written to."""
    arrays = {key: array.copy() for key, array in index.arrays().items()}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


@PROPERTIES.add(count=[0, 1, 40])
def an_index_made_of_saved_arrays_finds_the_same_and_takes_more(name, count):
    vectors, query = unit_rows(5, count, 6), unit_rows(6, 3, 6)
    index = filled(name, vectors)
    loaded = type(index).from_arrays(6, copies(index))
    assert len(loaded) == count
    for one in (index, loaded):
        one.add(vectors[:2])
    for want, got in zip(index.search(query, 9), loaded.search(query, 9), strict=True):
        np.testing.assert_array_equal(got, want)


@PROPERTIES.add()
def vectors_alone_are_enough_to_make_an_index(name):
    vectors, query = unit_rows(5, 40, 6), unit_rows(6, 3, 6)
    made = registry.get("indexes", name).from_arrays(6, {"vectors": vectors})
    for want, got in zip(filled(name, vectors).search(query, 9), made.search(query, 9), strict=True):
        np.testing.assert_array_equal(got, want)


@PROPERTIES.add()
def saved_arrays_that_are_absent_or_of_another_form_are_refused(name):
    index = filled(name, unit_rows(5, 40, 6))
    kind = type(index)
    with pytest.raises(ValueError, match="no array 'vectors'"):
        kind.from_arrays(6, {})
    with pytest.raises(ValueError, match="array 'vectors'"):
        kind.from_arrays(5, copies(index))
    for key, array in copies(index).items():
        with pytest.raises(ValueError, match=f"array {key!r}"):
            kind.from_arrays(6, copies(index) | {key: array[None]})
        with pytest.raises(ValueError, match=f"array {key!r}"):
            kind.from_arrays(6, copies(index) | {key: array.astype(np.complex64)})


@PROPERTIES.add(queries=[1, 16])
def on_clustered_vectors_the_ten_best_are_found(name, queries):
    rng = np.random.default_rng(0)
    centres = unit_rows(1, 50, 32)
    vectors = centres[rng.integers(50, size=6000)] + 0.1 * rng.normal(size=(6000, 32))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    query = vectors[rng.permutation(6000)[:queries]]
    index = filled(name, vectors)
    mask = np.arange(6000) % 3 > 0
    for allowed in (None, mask):
        found = index.search(query, 10, allowed_N=allowed)[1]
        want = filled("flat", vectors).search(query, 10, allowed_N=allowed)[1]
        shared = sum(len(np.intersect1d(a, b)) for a, b in zip(found, want, strict=True))
        assert shared >= (1.0 if index.exact else 0.9) * want.size
