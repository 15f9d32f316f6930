import numpy as np
import pytest

from loraweave.hub.indexes import faiss_ivf
from loraweave.hub.indexes.faiss_ivf import FaissIvf

pytest.importorskip("faiss")


@pytest.fixture
def lists(monkeypatch):
    monkeypatch.setattr(faiss_ivf, "MIN_CLUSTERED", 500)


def made(vectors):
    index = FaissIvf(vectors.shape[1])
    index.add(vectors)
    return index


@pytest.mark.usefixtures("lists")
def test_nine_of_the_ten_best_are_found_and_scored_as_the_reference_does(clustered, recall):
    vectors, query = clustered(4000), clustered(50, seed=1)
    index = made(vectors)
    assert set(index.arrays()) == {"vectors", "centres", "starts", "rows", "codes", "share"}
    assert recall(index, vectors, query) > 0.9
    scores, positions = index.search(query, 3)
    want = np.round(np.einsum("qkd,qd->qk", vectors[positions].astype(np.float64), query.astype(np.float64)), 6)
    np.testing.assert_array_equal(scores, want.astype(np.float32))


@pytest.mark.usefixtures("lists")
def test_vectors_added_later_are_found_before_and_after_the_lists_are_made_anew(clustered):
    vectors, more = clustered(1000), clustered(700, seed=2)
    index = made(vectors)
    for end in (100, 700):
        index.add(more[len(index) - 1000 : end])
        some = more[:end]
        assert index.search(some, 1)[1][:, 0].tolist() == list(range(1000, 1000 + end))
        assert int(index.arrays()["starts"][-1]) == (1000 if end == 100 else 1700)


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("k", [10, 600, 4000, 9999])
def test_as_many_are_found_as_asked_for_or_there_are(k, clustered):
    vectors = clustered(4000)
    positions = made(vectors).search(vectors[:2], k)[1]
    assert positions.shape == (2, min(k, 4000))
    assert all(len(set(row)) == len(row) for row in positions.tolist())


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize("share", [0.5, 0.1, 0.002])
def test_a_mask_leaves_only_what_it_allows_and_most_of_that_is_found(share, clustered, recall):
    vectors, query = clustered(4000), clustered(20, seed=1)
    mask = np.random.default_rng(0).random(4000) < share
    index = made(vectors)
    assert mask[index.search(query, 5, allowed_N=mask)[1]].all()
    assert recall(index, vectors, query, 5, allowed_N=mask) > (0.9 if share > 0.01 else 0.9999)


@pytest.mark.usefixtures("lists")
def test_the_same_vectors_make_the_same_lists(clustered):
    vectors = clustered(1500)
    first, second = made(vectors).arrays(), made(vectors.copy()).arrays()
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("lists")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("starts", (0, 1)),
        ("starts", (2, 10**6)),
        ("starts", (-1, 10**6)),
        ("rows", (3, -1)),
        ("rows", (3, 1500)),
        ("share", (0, 0.0)),
    ],
)
def test_saved_lists_that_reach_outside_the_vectors_are_refused(name, change, clustered):
    arrays = {key: array.copy() for key, array in made(clustered(1500)).arrays().items()}
    assert len(FaissIvf.from_arrays(24, arrays)) == 1500
    arrays[name][change[0]] = change[1]
    with pytest.raises(ValueError, match=f"array {name!r} of the saved index"):
        FaissIvf.from_arrays(24, arrays)


@pytest.mark.usefixtures("lists")
def test_equal_vectors_by_the_hundred_are_searched(clustered):
    vectors = np.repeat(clustered(3), 400, axis=0)
    assert made(vectors).search(vectors[:1], 3)[0].tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.usefixtures("lists")
def test_as_many_lists_are_looked_into_as_the_vectors_take(clustered, recall):
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(3000, 24)).astype(np.float32)
    smooth /= np.linalg.norm(smooth, axis=1, keepdims=True)
    tight = clustered(60)[rng.integers(60, size=3000)] + 0.001 * smooth
    shares = [float(made(vectors).arrays()["share"][0]) for vectors in (tight, smooth)]
    assert shares[0] < 0.1 < shares[1]
    assert recall(made(smooth[:2900]), smooth[:2900], smooth[2900:]) > 0.95
