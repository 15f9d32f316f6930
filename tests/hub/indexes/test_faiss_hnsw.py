import numpy as np
import pytest

from loraweave.hub.indexes import faiss_hnsw
from loraweave.hub.indexes.faiss_hnsw import FaissHnsw

pytest.importorskip("faiss")


@pytest.fixture
def linked(monkeypatch):
    monkeypatch.setattr(faiss_hnsw, "MIN_LINKED", 500)


def made(vectors):
    index = FaissHnsw(vectors.shape[1])
    index.add(vectors)
    return index


@pytest.mark.usefixtures("linked")
def test_nearly_all_of_the_ten_best_are_found_also_among_those_added_later(clustered, recall):
    vectors, query = clustered(3000), clustered(50, seed=1)
    index = made(vectors[:2000])
    index.add(vectors[2000:])
    assert set(index.arrays()) == {"vectors", "levels", "links", "entry", "effort"}
    assert recall(index, vectors, query) > 0.95


@pytest.mark.usefixtures("linked")
def test_a_saved_graph_is_walked_as_the_one_it_was_made_of(clustered):
    vectors, query = clustered(2000), clustered(20, seed=1)
    index = made(vectors)
    loaded = FaissHnsw.from_arrays(24, {key: array.copy() for key, array in index.arrays().items()})
    for want, got in zip(index.search(query, 10), loaded.search(query, 10), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.usefixtures("linked")
@pytest.mark.parametrize("k", [10, 400, 600, 9999])
def test_as_many_are_found_as_asked_for_or_there_are(k, clustered):
    vectors = clustered(1200)
    positions = made(vectors).search(vectors[:2], k)[1]
    assert positions.shape == (2, min(k, 1200))
    assert all(len(set(row)) == len(row) for row in positions.tolist())


@pytest.mark.usefixtures("linked")
@pytest.mark.parametrize("share", [0.5, 0.1, 0.002])
def test_a_mask_leaves_only_what_it_allows_and_most_of_that_is_found(share, clustered, recall):
    vectors, query = clustered(3000), clustered(20, seed=1)
    mask = np.random.default_rng(0).random(3000) < share
    index = made(vectors)
    assert mask[index.search(query, 5, allowed_N=mask)[1]].all()
    assert recall(index, vectors, query, 5, allowed_N=mask) > 0.9


@pytest.mark.usefixtures("linked")
@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("levels", 0, 0),
        ("levels", 0, 65),
        ("levels", 3, 9),
        ("links", 5, -2),
        ("links", 5, 2000),
        ("entry", 0, 2000),
        ("entry", 0, -1),
        ("effort", 0, 0),
        ("effort", 0, 10**6),
    ],
)
def test_a_saved_graph_that_leads_outside_is_refused(name, place, value, clustered):
    arrays = {key: array.copy() for key, array in made(clustered(2000)).arrays().items()}
    arrays[name][place] = value
    with pytest.raises(ValueError, match="of the saved index"):
        FaissHnsw.from_arrays(24, arrays)


@pytest.mark.usefixtures("linked")
def test_a_link_into_a_layer_that_the_row_does_not_have_is_refused(clustered):
    arrays = {key: array.copy() for key, array in made(clustered(2000)).arrays().items()}
    high = int(np.argmax(arrays["levels"] > 1))
    begin = int(((arrays["levels"][:high] + 1) * faiss_hnsw.NUM_LINKS).sum()) + 2 * faiss_hnsw.NUM_LINKS
    arrays["links"][begin] = int(np.argmin(arrays["levels"]))
    with pytest.raises(ValueError, match="layers that rows do not have"):
        FaissHnsw.from_arrays(24, arrays)
