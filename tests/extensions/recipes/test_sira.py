"""Sparse top-k with capacity and dropout of experts in training, and with neither in evaluation."""

import math

import pytest
import torch
from torch.nn import functional

LAYER = "model.layers.1.self_attn.v_proj"
SMALL = {"num_experts": 4, "top_k": 2, "rank": 2, "alpha": 6.0}


def expected(site, kept=None, kept_TE=None):
    """y_TO of the formula; of an expert's tokens only the first `kept`, or those of kept_TE."""
    rows, used_E = [], [0] * 4
    for place, (x_I, y0_O) in enumerate(zip(site.x_TI, site.y0_TO, strict=True)):
        p_E = functional.softmax(site.gate.r_EI @ x_I, dim=0)
        y_O = y0_O
        for expert in p_E.topk(2).indices.tolist():
            used_E[expert] += 1
            if (kept is None or used_E[expert] <= kept) and (kept_TE is None or kept_TE[place][expert]):
                y_O = y_O + p_E[expert] * 3.0 * site.b_ERO[expert].T @ (site.a_ERI[expert] @ x_I)
        rows.append(y_O)
    return torch.stack(rows)


def test_in_training_what_overflows_an_experts_capacity_adds_nothing(seen_at):
    # 0.5 of 7 tokens * 2 / 4 experts, rounded up
    site = seen_at("sira", LAYER, training=True, capacity=0.5, expert_dropout=0.0, prioritised=False, **SMALL)
    torch.testing.assert_close(site.y_TO, expected(site, kept=2))
    dropped_T = (expected(site, kept=2) == site.y0_TO).all(dim=1)
    assert dropped_T.any()
    assert torch.equal(site.y_TO[dropped_T], site.y0_TO[dropped_T])


def test_by_priority_an_expert_has_the_tokens_that_it_weighs_most(seen_at):
    site = seen_at("sira", LAYER, training=True, capacity=0.5, expert_dropout=0.0, **SMALL)
    p_TE = functional.softmax(site.x_TI @ site.gate.r_EI.T, dim=1)
    chosen_TE = torch.zeros_like(p_TE).scatter(1, p_TE.topk(2, dim=1).indices, 1.0) * p_TE
    # 0.5 of 7 tokens * 2 / 4 experts, rounded up
    kept_TE = [[bool(p > 0 and (chosen_TE[:, e] > p).sum() < 2) for e, p in enumerate(row)] for row in chosen_TE]
    assert sum(map(sum, kept_TE)) < 14
    torch.testing.assert_close(site.y_TO, expected(site, kept_TE=kept_TE))


def test_a_capacity_of_all_tokens_is_no_limit(seen_at):
    limited = seen_at("sira", LAYER, training=True, capacity=2.0, expert_dropout=0.0, **SMALL)
    free = seen_at("sira", LAYER, training=True, capacity=None, expert_dropout=0.0, **SMALL)
    assert torch.equal(limited.y_TO, free.y_TO)


def test_in_training_tokens_do_without_experts_that_they_have_in_evaluation(terms_of):
    batch = {"input_ids": torch.arange(40).view(2, 20)}
    _, notes = terms_of("sira", batch, expert_dropout=0.4, capacity=None, target_modules=("q_proj", "up_proj"))
    for layer, w_BTE in notes.weights.items():
        gone_BTE = notes.scores[layer] == -torch.inf
        # five standard deviations of the share of n draws
        assert float(gone_BTE.double().mean()) == pytest.approx(0.4, abs=5 * math.sqrt(0.4 * 0.6 / gone_BTE.numel()))
        assert not w_BTE[gone_BTE].any()
        assert torch.equal((w_BTE != 0).sum(dim=-1), torch.full((2, 20), 4))


def test_its_loss_is_the_balance_of_the_scores_that_chose(terms_of):
    batch = {"input_ids": torch.tensor([[3, 9, 27, 20, 5]])}
    terms, notes = terms_of("sira", batch, balance=0.5, num_experts=4, top_k=2, target_modules=(LAYER,))
    (scores_BTE,) = notes.scores.values()
    p_NE = scores_BTE[0].softmax(dim=1)
    counts_E = torch.zeros(4, dtype=torch.float64)
    for p_E in p_NE:
        counts_E[p_E.topk(2).indices] += 1
    torch.testing.assert_close(terms["balance"], 0.5 * 4 * (counts_E / 5 * p_NE.mean(dim=0)).sum())
