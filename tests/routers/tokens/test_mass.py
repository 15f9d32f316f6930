"""MASS: residuals by dense projections, the choice by loops over experts, and the mean over the tokens so far."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.errors import ScopeError, WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._saved import router

LAYER = "q"


@pytest.fixture
def pool(random_pool):
    return random_pool(*({LAYER: (rank, 20, 24)} for rank in (4, 2, 6, 1, 3)), {"other": (2, 7, 5)})


def residual(adapter, x_I, k=None):
    delta = (adapter.layers[LAYER].b_OR.double() @ adapter.layers[LAYER].a_RI.double()).numpy()
    basis = np.linalg.svd(delta)[2][: adapter.rank][:k]
    return np.linalg.norm(x_I - basis.T @ (basis @ x_I))


def chosen(residuals, temperature=1.0, threshold=0.2, most=3):
    """The places of the experts that the released code takes."""
    logits = -np.array(residuals)
    logits = (logits - logits.mean()) / (logits.std(ddof=1) + 1e-6) / temperature
    p = np.exp(logits) / np.exp(logits).sum()
    above = [place for place in np.argsort(-p) if p[place] > threshold]
    return set(above[:most] or [int(p.argmax())])


@pytest.mark.parametrize("k", [None, 1, 2])
def test_a_score_is_the_length_that_projecting_leaves(pool, x_BTI, k):
    found = router("mass", pool, decision="token", k=k).double().scores(x_BTI, LAYER)
    for b, t in np.ndindex(2, 5):
        expected = [-residual(pool[f"e{e}"], x_BTI[b, t].numpy(), k) for e in range(5)]
        assert np.allclose(found[b, t, :5].numpy(), expected, rtol=1e-5)
    assert bool((found[..., 5] == -torch.inf).all())


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.3}, {"threshold": 0.0, "most": 2}, {"threshold": 1.0}, {"threshold": 0.25, "most": 5}]
)
def test_the_experts_above_the_threshold_are_summed_or_the_likeliest_one(pool, x_BTI, options):
    w_BTE = router("mass", pool, decision="token", **options).double().weights(x_BTI, LAYER)
    for b, t in np.ndindex(2, 5):
        taken = chosen([residual(pool[f"e{e}"], x_BTI[b, t].numpy()) for e in range(5)], **options)
        assert w_BTE[b, t].tolist() == [float(place in taken) for place in range(6)]


def test_a_sequence_is_decided_on_by_the_mean_over_its_real_tokens_so_far(model, make_adapters):
    pool = ExpertPool(make_adapters(model, "llama"))
    ids_BT = torch.tensor([[5, 9, 11, 2, 30], [0, 0, 7, 8, 3]])
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    made = router("mass", pool, threshold=0.3)
    layer = next(name for name in pool.layer_names if sum(name in a.layers for a in pool.adapters.values()) > 1)
    engine = Composer(model, pool)
    seen = []
    handle = dict(model.named_modules())[layer].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), engine.activate(made):
        model(input_ids=ids_BT, attention_mask=mask_BT)
    handle.remove()
    found, scores = engine.last_weights[layer], made.scores(seen[0], layer)
    there = [place for place, a in enumerate(pool.adapters.values()) if layer in a.layers]
    for b in range(2):
        for t in range(5):
            if not mask_BT[b, t]:
                continue
            real = [s for s in range(t + 1) if mask_BT[b, s]]
            means = [float(-scores[b, real, place].mean()) for place in there]
            taken = {there[place] for place in chosen(means, threshold=0.3)}
            assert {place for place, w in enumerate(found[b, t].tolist()) if w} == taken


def test_what_cannot_be_meant_is_refused_by_name(pool, x_BTI):
    with pytest.raises(ScopeError, match="'mass' decides by the tokens so far"):
        router("mass", pool).weights(x_BTI, LAYER)
    with pytest.raises(WeightingError, match="threshold=2"):
        router("mass", pool, threshold=2.0)
