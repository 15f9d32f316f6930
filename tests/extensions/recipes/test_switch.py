"""Each token's one best expert, at its probability."""

import torch
from torch.nn import functional

LAYER = "model.layers.1.mlp.up_proj"
BATCH = {"input_ids": torch.tensor([[3, 9, 27, 20, 5]])}


def expected(site, scale, kept):
    """y_TO of the formula, for tokens and experts that `kept` says."""
    rows, used = [], {}
    for x_I, y0_O in zip(site.x_TI, site.y0_TO, strict=True):
        p_E = functional.softmax(site.gate.r_EI @ x_I, dim=0)
        best = int(p_E.argmax())
        used[best] = used.get(best, 0) + 1
        rows.append(y0_O + (used[best] <= kept) * p_E[best] * scale * site.b_ERO[best].T @ (site.a_ERI[best] @ x_I))
    return torch.stack(rows)


def test_in_training_a_token_after_an_experts_capacity_gets_the_base_alone(seen_at):
    # 0.8 of 7 tokens over 3 experts, rounded up
    site = seen_at("switch", LAYER, training=True, num_experts=3, rank=2, alpha=6.0, capacity=0.8)
    torch.testing.assert_close(site.y_TO, expected(site, 3.0, kept=2))
    assert torch.equal(site.y_TO, site.y0_TO) is False
    dropped_T = (site.y_TO == site.y0_TO).all(dim=1)
    assert 1 <= int(dropped_T.sum()) < 7


def test_a_capacity_of_all_experts_shares_is_no_limit(seen_at):
    options = {"training": True, "num_experts": 3, "rank": 2}
    limited, free = seen_at("switch", LAYER, capacity=3.0, **options), seen_at("switch", LAYER, capacity=None, **options)
    assert torch.equal(limited.y_TO, free.y_TO)


def test_its_losses_are_the_published_ones_with_their_coefficients(terms_of):
    terms, notes = terms_of("switch", BATCH, num_experts=3, balance=0.5, z=0.25, target_modules=("up_proj", "v_proj"))
    balances, squares = [], []
    for scores_BTE in notes.scores.values():
        scores_NE = scores_BTE[0]
        p_NE = scores_NE.softmax(dim=1)
        share_E = torch.stack([(p_NE.argmax(dim=1) == expert).double().mean() for expert in range(3)])
        balances.append(3 * (share_E * p_NE.mean(dim=0)).sum())
        squares.append(scores_NE.exp().sum(dim=1).log().square().mean())
    assert len(balances) == 4
    torch.testing.assert_close(terms["balance"], 0.5 * torch.stack(balances).mean())
    torch.testing.assert_close(terms["z"], 0.25 * torch.stack(squares).mean())
