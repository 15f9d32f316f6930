"""One a for all experts."""

import torch

import loraweave as lw

LAYER = "model.layers.1.mlp.down_proj"


def test_a_site_learns_one_a_and_a_b_of_each_expert(make_model):
    with lw.experts("hydralora", make_model("llama"), num_experts=3, rank=2, target_modules=(LAYER,)) as made:
        (layer,), (site,) = made.layers.values(), made.sites.values()
        assert layer.a_SI.shape == (2, site.num_inputs)
        assert layer.b_SO.shape == (3 * 2, site.num_outputs)


def test_it_adds_no_loss(terms_of):
    assert terms_of("hydralora", {"input_ids": torch.tensor([[3, 9, 27]])})[0] == {}
