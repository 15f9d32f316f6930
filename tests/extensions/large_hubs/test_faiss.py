"""Indexes that use faiss: the exact one gives the reference's results bit for bit, the approximate one nearly all."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from loraweave.errors import PackageMissing
from loraweave.extensions.large_hubs import FaissHalf, FaissIvf
from loraweave.extensions.large_hubs.indexes import _faiss, faiss_ivf
from loraweave.hub.indexes.flat import Flat, index_choice


def test_without_faiss_the_message_has_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(PackageMissing, match="pip install 'faiss-cpu"):
        FaissHalf(4)


pytest.importorskip("faiss")


@pytest.mark.parametrize(
    ("count", "kind"), [(999, Flat), (1_000, FaissHalf), (199_999, FaissHalf), (200_000, FaissIvf), (10**7, FaissIvf)]
)
def test_the_index_taken_where_none_is_named_is_exact_up_to_200_000_keys(count, kind):
    assert index_choice("auto")(count) is kind


def test_without_faiss_no_index_of_it_is_taken_where_none_is_named(monkeypatch):
    monkeypatch.setattr(_faiss.importlib.util, "find_spec", lambda name: None)
    assert _faiss.from_keys(200_000) is None


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Lists are made from 500 vectors on."""
    monkeypatch.setattr(faiss_ivf, "MIN_CLUSTERED", 500)


def made(kind, vectors):
    index = kind(vectors.shape[1])
    index.add(vectors)
    return index


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(count, seed=0):
    """Unit vectors (count, 24) around 60 centres."""
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(60, 24))[rng.integers(60, size=count)] + 0.4 * rng.normal(size=(count, 24)))


def recall(index, vectors, query, k=10, **mask):
    """The share of the k best, by the exact index, that the index of the vectors finds."""
    found, want = index.search(query, k, **mask), made(Flat, vectors).search(query, k, **mask)
    assert found[0].shape == want[0].shape
    return np.mean([len(np.intersect1d(a, b)) for a, b in zip(found[1], want[1], strict=True)]) / k


def require_same(one, other, query, k):
    for want, got in zip(one.search(query, k), other.search(query, k), strict=True):
        np.testing.assert_array_equal(got, want)


def saved(index):
    return {key: array.copy() for key, array in index.arrays().items()}


@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("spread", [1e-7, 1e-4, 1e-2])
def test_rows_nearer_to_each_other_than_a_scan_can_tell_are_ranked_as_the_reference_does(spread, queries):
    rng = np.random.default_rng(0)
    vectors = unit(rng.normal(size=(1, 48)) + spread * rng.normal(size=(900, 48)))
    query = rng.normal(size=(queries, 48)).astype(np.float32)
    for k in (1, 17, 900):
        require_same(made(Flat, vectors), made(FaissHalf, vectors), query, k)


@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_vectors_too_small_or_too_large_for_half_precision_are_ranked_as_the_reference_does(size):
    rng = np.random.default_rng(0)
    vectors, query = rng.normal(size=(300, 12)).astype(np.float32) * np.float32(size), rng.normal(size=(2, 12))
    require_same(made(Flat, vectors), made(FaissHalf, vectors), query, 9)


def test_half_of_the_bytes_are_scanned():
    arrays = made(FaissHalf, np.eye(5, dtype=np.float32)).arrays()
    assert arrays["codes"].nbytes * 2 == arrays["vectors"].nbytes


def test_nearly_all_of_the_ten_best_are_found_also_among_those_added_later_and_scored_as_the_reference_does():
    vectors, query = clustered(4000), clustered(50, seed=1)
    index = made(FaissIvf, vectors[:3500])
    index.add(vectors[3500:])
    assert set(index.arrays()) == {"vectors", "centres", "starts", "rows", "codes", "share"}
    assert recall(index, vectors, query) > 0.9
    scores, positions = index.search(query, 3)
    want = np.round(np.einsum("qkd,qd->qk", vectors[positions].astype(np.float64), query.astype(np.float64)), 6)
    np.testing.assert_array_equal(scores, want.astype(np.float32))


def test_what_was_saved_finds_what_it_was_made_of():
    index = made(FaissIvf, clustered(2000))
    require_same(index, FaissIvf.from_arrays(24, saved(index)), clustered(20, seed=1), 10)


@pytest.mark.parametrize("k", [10, 400, 600, 9999])
def test_as_many_are_found_as_asked_for_or_there_are(k):
    vectors = clustered(1200)
    positions = made(FaissIvf, vectors).search(vectors[:2], k)[1]
    assert positions.shape == (2, min(k, 1200))
    assert all(len(set(row)) == len(row) for row in positions.tolist())


@pytest.mark.parametrize("share", [0.5, 0.1, 0.002])
def test_a_mask_leaves_only_what_it_allows_and_most_of_that_is_found(share):
    vectors, query = clustered(4000), clustered(20, seed=1)
    mask = np.random.default_rng(0).random(4000) < share
    index = made(FaissIvf, vectors)
    assert mask[index.search(query, 5, allowed_N=mask)[1]].all()
    assert recall(index, vectors, query, 5, allowed_N=mask) > (0.9 if share > 0.01 else 0.9999)


def test_equal_vectors_by_the_hundred_are_searched():
    vectors = np.repeat(clustered(3), 400, axis=0)
    assert made(FaissIvf, vectors).search(vectors[:1], 3)[0].tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("starts", 0, 1),
        ("starts", 2, 10**6),
        ("starts", -1, 10**6),
        ("rows", 3, -1),
        ("rows", 3, 1500),
        ("share", 0, 0.0),
    ],
)
def test_saved_arrays_that_lead_outside_are_refused(name, place, value):
    arrays = saved(made(FaissIvf, clustered(1500)))
    assert len(FaissIvf.from_arrays(24, {key: array.copy() for key, array in arrays.items()})) == 1500
    arrays[name][place] = value
    with pytest.raises(ValueError, match=f"array '{name}' of the saved index"):
        FaissIvf.from_arrays(24, arrays)


def test_vectors_added_later_are_found_before_and_after_the_lists_are_made_anew():
    vectors, more = clustered(1000), clustered(700, seed=2)
    index = made(FaissIvf, vectors)
    for end in (100, 700):
        index.add(more[len(index) - 1000 : end])
        some = more[:end]
        assert index.search(some, 1)[1][:, 0].tolist() == list(range(1000, 1000 + end))
        assert int(index.arrays()["starts"][-1]) == (1000 if end == 100 else 1700)


def test_the_same_vectors_make_the_same_lists():
    vectors = clustered(1500)
    first, second = made(FaissIvf, vectors).arrays(), made(FaissIvf, vectors.copy()).arrays()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_the_centre_found_by_groups_is_the_nearest_of_all_for_nearly_all_vectors_with_clusters(monkeypatch):
    vectors, centres = np.split(clustered(5450, seed=1), [5000])
    found, want = faiss_ivf._grouped(centres)(vectors), faiss_ivf.nearest_of_all(vectors, centres)
    np.testing.assert_array_equal(want, np.argmax(vectors @ centres.T, axis=1))
    assert 0.95 < np.mean(found == want) < 1
    np.testing.assert_array_equal(faiss_ivf.nearest(vectors, centres), found)
    # with all groups near but one, which is the farthest, every centre that counts is compared
    monkeypatch.setattr(faiss_ivf, "_NEAR_GROUPS", round(450**0.5) - 1)
    np.testing.assert_array_equal(faiss_ivf.nearest(vectors, centres), want)


def test_vectors_without_clusters_are_compared_with_all_centres():
    rng = np.random.default_rng(0)
    vectors, centres = unit(rng.normal(size=(5000, 24))), unit(rng.normal(size=(450, 24)))
    np.testing.assert_array_equal(faiss_ivf.nearest(vectors, centres), faiss_ivf.nearest_of_all(vectors, centres))


def test_as_many_lists_are_looked_into_as_the_vectors_take():
    rng = np.random.default_rng(0)
    smooth = unit(rng.normal(size=(3000, 24)))
    tight = clustered(60)[rng.integers(60, size=3000)] + 0.001 * smooth
    shares = [float(made(FaissIvf, vectors).arrays()["share"][0]) for vectors in (tight, smooth)]
    assert shares[0] < 0.1 < shares[1]
    assert recall(made(FaissIvf, smooth[:2900]), smooth[:2900], smooth[2900:]) > 0.95
