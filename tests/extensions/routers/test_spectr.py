"""SpectR and LAG, against the dense updates."""

from __future__ import annotations

import pytest
import torch

from loraweave.routers.tokens._saved import router

LAYER = "q"


@pytest.fixture
def pool(random_pool):
    return random_pool(*({LAYER: (rank, 32, 24)} for rank in (4, 2, 30, 1, 3)))


@pytest.fixture
def deltas(pool):
    return [a.layers[LAYER].b_OR.double() @ a.layers[LAYER].a_RI.double() for a in pool.adapters.values()]


@pytest.fixture
def x_BTI():
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))


def test_a_score_is_the_length_of_what_the_expert_adds(pool, deltas, x_BTI):
    found = router("spectr", pool).scores(x_BTI, LAYER)
    expected = torch.stack([(x_BTI.double() @ delta.T).norm(dim=-1) for delta in deltas], dim=-1)
    assert torch.allclose(found.double(), expected, rtol=1e-4)


def test_spectr_weighs_the_top_k_by_their_softmax(pool, deltas, x_BTI):
    found = router("spectr", pool, top_k=2, temperature=5.0).weights(x_BTI, LAYER)
    scores = torch.stack([(x_BTI.double() @ delta.T).norm(dim=-1) for delta in deltas], dim=-1) / 5.0
    threshold = scores.sort(dim=-1, descending=True).values[..., 1:2]
    expected = torch.where(scores >= threshold, scores.exp(), 0.0)
    expected = expected / expected.sum(dim=-1, keepdim=True)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_lag_takes_arrows_candidates_and_spectrs_best_of_them(pool, deltas, x_BTI):
    found = router("lag", pool, candidates=2).weights(x_BTI, LAYER)
    v_EI = torch.stack([torch.linalg.svd(delta).Vh[0] for delta in deltas])
    along = (x_BTI.double() @ v_EI.T).abs()
    lengths = torch.stack([(x_BTI.double() @ delta.T).norm(dim=-1) for delta in deltas], dim=-1)
    disagreements = 0
    for b in range(2):
        for t in range(9):
            candidates = along[b, t].argsort(descending=True)[:2].tolist()
            best = max(candidates, key=lambda place: float(lengths[b, t, place]))
            disagreements += best != int(lengths[b, t].argmax())
            assert found[b, t].tolist() == [float(place == best) for place in range(5)]
    # otherwise this would be SpectR alone
    assert disagreements


def test_all_experts_as_candidates_is_spectr(pool, x_BTI):
    found = router("lag", pool, candidates=5, top_k=3, temperature=5.0).weights(x_BTI, LAYER)
    assert torch.equal(found, router("spectr", pool, top_k=3, temperature=5.0).weights(x_BTI, LAYER))


@pytest.mark.parametrize("score", ["arrow", "spectr"])
def test_the_top_1_has_weight_1_whatever_its_probability(pool, x_BTI, score):
    scored = router(score, pool, top_k=1)
    best_BT = scored.scores(x_BTI, LAYER).argmax(dim=-1)
    assert torch.equal(scored.weights(x_BTI, LAYER), torch.nn.functional.one_hot(best_BT, 5).float())
