"""Every rank an expert: the formula at a site, and the loss that keeps the ranks busy."""

import pytest
import torch

import loraweave as lw
from loraweave.errors import WeightingError

LAYER = "model.layers.1.mlp.up_proj"
BATCH = {
    "input_ids": torch.tensor([[3, 9, 27, 20, 41], [0, 0, 25, 3, 15]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
}


def test_a_site_adds_its_formula(adds_up):
    def weights(made, row, x_TI, x_I):
        p_E = (made.gates[LAYER.replace(".", "/")].r_EI @ x_I).softmax(dim=0).tolist()
        best = sorted(range(6), key=lambda e: -p_E[e])[:2]
        return [p_E[e] if e in best else 0.0 for e in range(6)]

    adds_up("smora", LAYER, BATCH, weights, 3.0 / 6, rank=6, top_k=2, alpha=3.0)


def test_its_ranks_are_rows_of_one_lora(make_model):
    with lw.experts("smora", make_model("llama"), rank=5, top_k=2, target_modules=(LAYER,)) as made:
        (site,) = made.layers.values()
        assert (tuple(site.a_SI.shape), tuple(site.b_SO.shape)) == ((5, 16), (5, 24))
        assert made.expert(3).rank == 1


def test_its_balance_is_that_of_the_ranks_of_real_tokens(terms_of):
    terms, notes = terms_of("smora", BATCH, rank=4, top_k=2, balance=0.5, target_modules=(LAYER,))
    (scores_BTE,) = notes.scores.values()
    p_NE = scores_BTE[BATCH["attention_mask"].bool()].softmax(dim=1)
    counts_E = torch.zeros(4, dtype=torch.float64)
    for p_E in p_NE:
        counts_E[p_E.topk(2).indices] += 1
    torch.testing.assert_close(terms["balance"], 0.5 * 4 * (counts_E / len(p_NE) * p_NE.mean(dim=0)).sum())


def test_more_ranks_a_token_than_there_are_is_refused(make_model):
    with pytest.raises(WeightingError, match="top_k=9"):
        lw.experts("smora", make_model("llama"), rank=8, top_k=9)
