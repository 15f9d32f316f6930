"""Each token's best k experts of the feed-forward layers."""

import torch
from torch.nn import functional

import loraweave as lw

LAYER = "model.layers.0.mlp.gate_proj"


def test_a_site_adds_its_formula(seen_at):
    site = seen_at("moral", LAYER, num_experts=4, top_k=2, rank=3, alpha=1.5)
    for x_I, y0_O, y_O in zip(site.x_TI, site.y0_TO, site.y_TO, strict=True):
        scores_E = site.gate.r_EI @ x_I
        best = scores_E.topk(2).indices
        for w, expert in zip(functional.softmax(scores_E[best], dim=0), best.tolist(), strict=True):
            y0_O = y0_O + w * 0.5 * site.b_ERO[expert].T @ (site.a_ERI[expert] @ x_I)
        torch.testing.assert_close(y_O, y0_O)


def test_its_experts_are_in_the_feed_forward_layers(make_model):
    with lw.experts("moral", make_model("llama", num_hidden_layers=1)) as made:
        assert list(made.sites) == [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_it_adds_a_balance_loss_where_asked_to(terms_of):
    batch = {"input_ids": torch.tensor([[3, 9, 27, 20, 5]])}
    assert terms_of("moral", batch)[0] == {}
    assert set(terms_of("moral", batch, balance=0.1)[0]) == {"balance"}
