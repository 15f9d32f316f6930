"""Each token's best k experts, whose weights sum to 1."""

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import loraweave as lw
from loraweave.routers.recipes._gate import Call
from loraweave.routers.recipes._recipe import Site
from loraweave.routers.recipes.mixtral import Mixtral

LAYER = "model.layers.0.mlp.down_proj"
BATCH = {
    "input_ids": torch.tensor([[3, 9, 27, 20, 5], [8, 8, 6, 0, 0]]),
    "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
}


def test_its_gate_is_the_router_of_transformers():
    theirs = MixtralTopKRouter(MixtralConfig(hidden_size=5, num_local_experts=4, num_experts_per_tok=2))
    gate, x_BTI = Mixtral(num_experts=4, top_k=2).gate(Site("up_proj", 5, 7), 4), torch.randn(2, 6, 5)
    torch.nn.init.normal_(gate.r_EI)
    theirs.weight.data.copy_(gate.r_EI.data)
    w_BTE, scores_BTE, _ = gate(x_BTI, Call())
    scores_NE, weights_NK, chosen_NK = theirs(x_BTI)
    torch.testing.assert_close(scores_BTE.flatten(0, 1), scores_NE)
    torch.testing.assert_close(w_BTE.flatten(0, 1), torch.zeros_like(scores_NE).scatter(1, chosen_NK, weights_NK))


def test_its_loss_counts_the_real_tokens_alone(terms_of):
    terms, notes = terms_of("mixtral", BATCH, num_experts=4, top_k=2, balance=0.5, target_modules=(LAYER,))
    (scores_BTE,) = notes.scores.values()
    p_NE = scores_BTE[BATCH["attention_mask"].bool()].softmax(dim=1)
    assert p_NE.shape == (8, 4)
    counts_E = torch.zeros(4, dtype=torch.float64)
    for p_E in p_NE:
        counts_E[p_E.topk(2).indices] += 1
    torch.testing.assert_close(terms["balance"], 0.5 * 4 * (counts_E / 8 * p_NE.mean(dim=0)).sum())


def test_noise_is_of_training_alone_and_learned(make_model):
    ids_BT = torch.tensor([[3, 9, 27, 20]])
    with (
        lw.experts("mixtral", make_model("llama"), noise=True) as noisy,
        lw.experts("mixtral", make_model("llama")) as plain,
    ):
        for made in (noisy, plain):
            torch.manual_seed(0)
            for layer in made.layers.values():
                torch.nn.init.normal_(layer.b_SO)
        assert torch.equal(noisy(input_ids=ids_BT).logits, plain(input_ids=ids_BT).logits)
        noisy.train()(input_ids=ids_BT, labels=ids_BT).loss.backward()
        assert all(gate.n_EI.grad.any() for gate in noisy.gates.values())
