"""Each token's best k experts of the feed-forward layers."""

import torch

import loraweave as lw

LAYER = "model.layers.0.mlp.gate_proj"


def test_its_experts_are_in_the_feed_forward_layers(make_model):
    with lw.experts("moral", make_model("llama", num_hidden_layers=1)) as made:
        assert list(made.sites) == [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_it_adds_a_balance_loss_where_asked_to(terms_of):
    batch = {"input_ids": torch.tensor([[3, 9, 27, 20, 5]])}
    assert terms_of("moral", batch)[0] == {}
    assert set(terms_of("moral", batch, balance=0.1)[0]) == {"balance"}
