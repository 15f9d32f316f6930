import numpy as np
import pytest

from loraweave.hub.indexes.faiss_half import FaissHalf
from loraweave.hub.indexes.flat import Flat

pytest.importorskip("faiss")


def both(vectors):
    flat, half = Flat(vectors.shape[1]), FaissHalf(vectors.shape[1])
    flat.add(vectors)
    half.add(vectors)
    return flat, half


@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("spread", [1e-7, 1e-4, 1e-2])
def test_rows_nearer_to_each_other_than_half_precision_can_tell_are_ranked_as_the_reference_does(spread, queries):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1, 48)) + spread * rng.normal(size=(900, 48))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    query = rng.normal(size=(queries, 48)).astype(np.float32)
    flat, half = both(vectors)
    for k in (1, 17, 900):
        for want, got in zip(flat.search(query, k), half.search(query, k), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("size", [1e-9, 1e6])
def test_vectors_too_small_or_too_large_for_half_precision_are_ranked_as_the_reference_does(size):
    rng = np.random.default_rng(0)
    vectors, query = rng.normal(size=(300, 12)).astype(np.float32) * np.float32(size), rng.normal(size=(2, 12))
    flat, half = both(vectors)
    for want, got in zip(flat.search(query, 9), half.search(query, 9), strict=True):
        np.testing.assert_array_equal(got, want)


def test_half_of_the_bytes_are_scanned():
    half = both(np.eye(5, dtype=np.float32))[1]
    assert half.arrays()["codes"].nbytes * 2 == half.arrays()["vectors"].nbytes
