"""Several LoRAs in parallel, each with a gain for every output."""

import torch

import loraweave as lw

LAYER = "model.layers.0.mlp.down_proj"
IDS_BT = torch.tensor([[3, 9, 27, 20], [5, 25, 3, 15]])


def test_a_site_adds_its_formula(adds_up):
    def gains(made, row, x_TI, x_I):
        return made.layers[LAYER.replace(".", "/")].gain_EO

    adds_up("multilora", LAYER, {"input_ids": IDS_BT}, gains, 5.0 / 2, rank=2, num_experts=3, alpha=5.0)


def test_the_adapter_is_the_model(make_model, trained):
    model = make_model("llama", dtype=torch.float64)
    with lw.experts("multilora", model, rank=2) as made:
        own = trained(made)(input_ids=IDS_BT).logits
        adapter = made.adapter()
    assert all(factors.rank == 6 for factors in adapter.layers.values())
    with lw.Composer(model, lw.ExpertPool([adapter])).activate({adapter.name: 1.0}):
        torch.testing.assert_close(model(input_ids=IDS_BT).logits, own, rtol=1e-4, atol=1e-4)


def test_an_update_has_at_most_the_rank_of_all_experts(make_model, trained):
    with lw.experts("multilora", make_model("llama"), rank=1, num_experts=4) as made:
        delta_OI = trained(made).adapter().delta(LAYER).double()
    assert int(torch.linalg.matrix_rank(delta_OI, rtol=1e-5)) == 4


def test_both_factors_are_drawn_and_the_gains_begin_as_zero(make_model):
    with lw.experts("multilora", make_model("llama"), rank=4, num_experts=5) as made:
        for layer in made.layers.values():
            bound = layer.a_SI.shape[1] ** -0.5
            assert not layer.gain_EO.any()
            assert 0.9 * bound < float(layer.a_SI.detach().abs().max()) <= bound
            assert 0.9 * 0.5 < float(layer.b_SO.detach().abs().max()) <= 0.5


def test_in_the_first_step_gains_alone_learn(make_model):
    with lw.experts("multilora", make_model("llama")) as made:
        made.train()(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
        learning = {name.rsplit(".", 1)[-1] for name, value in made.expert_parameters().items() if bool(value.grad.any())}
    assert learning == {"gain_EO"}
