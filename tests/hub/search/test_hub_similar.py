import math

import pytest
import torch
from tiny_models import random_factors

from loraweave.errors import RetrievalError
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.hub.stores.folder_blobs import blob_path
from loraweave.types import Factors

ONE = Adapter("one", "base", {"p": random_factors(0, rank=2), "q": random_factors(1, rank=2)})
OTHER = Adapter("other", "base", {"q": random_factors(2), "r": random_factors(3, rank=2)})
NEAR = Adapter(
    "near", "base", {"p": random_factors(0, rank=2), "q": random_factors(1, rank=2), "r": random_factors(3, rank=2)}
)
OPPOSITE = Adapter("opposite", "base", {name: Factors(-f.a_RI, f.b_OR) for name, f in ONE.layers.items()})
FAR_BASE = Adapter("far base", "another", {"q": random_factors(4, num_in=9)})


def dense_cosine(left, right):
    names = sorted(set(left.layers) | set(right.layers))

    def flat(adapter):
        zero = torch.zeros(5, 7, dtype=torch.float64)
        parts = [
            adapter.layers[n].b_OR.double() @ adapter.layers[n].a_RI.double() if n in adapter.layers else zero for n in names
        ]
        return torch.cat([part.flatten() for part in parts])

    return float(torch.nn.functional.cosine_similarity(flat(left), flat(right), dim=0))


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path) as hub:
        for adapter in (ONE, OTHER, NEAR, OPPOSITE, FAR_BASE):
            hub.add(adapter)
        yield hub


def test_scores_are_the_cosines_of_the_dense_updates_over_all_layers(hub):
    found = {candidate.name: candidate.score for candidate in hub.similar("one")}
    assert set(found) == {"other", "near", "opposite"}
    for other in (OTHER, NEAR, OPPOSITE):
        assert math.isclose(found[other.name], dense_cosine(ONE, other), rel_tol=1e-9, abs_tol=1e-12)


def test_the_nearest_comes_first_and_the_evidence_counts_shared_layers(hub):
    nearest = hub.similar("one", k=1)
    assert [(candidate.name, candidate.record) for candidate in nearest] == [("near", hub.record("near"))]
    assert nearest[0].evidence == "updates 2 of the 2 layers of 'one'"
    assert [candidate.name for candidate in hub.similar("one")][-1] == "opposite"


def test_equal_scores_keep_the_order_of_addition(hub):
    for name in ("z", "a"):
        hub.add(NEAR, name=name)
    assert [candidate.name for candidate in hub.similar("one", k=3)] == ["near", "z", "a"]


def test_k_is_a_whole_number_and_none_or_all_are_fine(hub):
    assert hub.similar("one", k=0) == []
    assert len(hub.similar("one", k=100)) == 3
    for k in (2.5, -1, "3"):
        with pytest.raises(RetrievalError, match="k is"):
            hub.similar("one", k=k)


def test_a_damaged_adapter_is_left_out_with_a_warning(hub):
    path = blob_path(hub.path, NEAR.hash)
    path.chmod(0o644)
    path.write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"left out.*'near'"):
        found = hub.similar("one")
    assert {candidate.name for candidate in found} == {"other", "opposite"}
