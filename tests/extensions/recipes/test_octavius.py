"""One gate for the whole model, from the embeddings of a row's prompt."""

import pytest
import torch
from torch.nn import functional

import loraweave as lw
from loraweave.errors import ScopeError

LAYER = "model.layers.1.mlp.up_proj"
# the second row is padded on the left
IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [0, 0, 25, 3, 15]])
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def weights_of(made, prompt):
    """w_E of a row with these tokens, written out."""
    x_TH = made.base_model.get_input_embeddings().weight[torch.tensor(prompt)]
    p_E = functional.softmax(made.gates["all"].r_EH @ x_TH.mean(dim=0), dim=0)
    best = p_E.topk(2).indices
    return torch.zeros_like(p_E).index_copy(0, best, p_E[best] / p_E[best].sum())


@pytest.mark.parametrize("as_released", [False, True])
def test_a_site_adds_its_formula(adds_up, as_released):
    counted = ([3, 9, 27, 20, 41], [0, 0, 25, 3, 15] if as_released else [25, 3, 15])
    options = {"rank": 2, "num_experts": 3, "alpha": 5.0, "as_released": as_released}
    scale, inputs = 1.0 if as_released else 5.0 / 2, {"input_ids": IDS_BT, "attention_mask": MASK_BT}
    adds_up("octavius", LAYER, inputs, lambda made, row, x_TI, x_I: weights_of(made, counted[row]), scale, **options)


def test_all_sites_and_tokens_of_a_row_have_the_weights_of_its_prompt(make_model, trained):
    labels_BT = torch.tensor([[-100, -100, 27, 20, 41], [-100, -100, -100, 3, 15]])
    with lw.experts("octavius", make_model("llama", dtype=torch.float64)) as made:
        trained(made).train()(input_ids=IDS_BT, attention_mask=MASK_BT, labels=labels_BT)
        assert len(made.notes.weights) == 14
        for w_BTE in made.notes.weights.values():
            assert w_BTE.shape == (2, 1, 4)
            torch.testing.assert_close(w_BTE[0, 0], weights_of(made, [3, 9]))
            torch.testing.assert_close(w_BTE[1, 0], weights_of(made, [25]))


def test_two_of_the_weights_of_a_row_are_above_zero_and_sum_to_one(make_model):
    with lw.experts("octavius", make_model("llama"), num_experts=5) as made:
        made.train()(input_ids=IDS_BT)
        (w_BTE, *_) = made.notes.weights.values()
        assert (w_BTE > 0).sum(dim=-1).tolist() == [[2], [2]]
        torch.testing.assert_close(w_BTE.sum(dim=-1), torch.ones(2, 1))


def test_the_released_gate_is_normal_and_ours_as_a_linear_layer(make_model):
    with lw.experts("octavius", make_model("llama"), num_experts=64, as_released=True) as made:
        # 1024 numbers
        assert abs(float(made.gates["all"].r_EH.detach().std()) - 1) < 5 / 2048**0.5
    with lw.experts("octavius", make_model("llama"), num_experts=64) as made:
        assert 0.24 < float(made.gates["all"].r_EH.detach().abs().max()) <= 0.25


def test_what_was_decided_by_the_prompt_holds_for_the_answer(make_model, trained):
    with lw.experts("octavius", make_model("llama", dtype=torch.float64)) as made:
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        written_BT = trained(made).generate(input_ids=IDS_BT, attention_mask=MASK_BT, **settings)
        mask_BT = torch.cat([MASK_BT, torch.ones(2, 4, dtype=torch.long)], dim=1)
        labels_BT = written_BT.clone()
        labels_BT[:, :5] = -100
        positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        logits = made(input_ids=written_BT, attention_mask=mask_BT, labels=labels_BT, position_ids=positions_BT).logits
        assert torch.equal(logits[:, 4:-1].argmax(dim=-1), written_BT[:, 5:])


def test_an_encoder_and_its_decoder_have_the_weights_of_the_encoder_s_text(make_model, trained):
    model = make_model("t5", dtype=torch.float64)
    labels_BT = torch.tensor([[7, 8, 9, 4, 5], [6, 5, 4, 3, 2]])
    with lw.experts("octavius", model, target_modules=("q", "v")) as made:
        trained(made).train()(input_ids=IDS_BT, attention_mask=MASK_BT, labels=labels_BT)
        for w_BTE in made.notes.weights.values():
            torch.testing.assert_close(w_BTE[1, 0], weights_of(made, [25, 3, 15]))
        settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
        together = made.eval().generate(input_ids=IDS_BT, attention_mask=MASK_BT, **settings)
        alone = made.generate(input_ids=torch.tensor([[25, 3, 15]]), **settings)
        length = min(alone.shape[1], together.shape[1])
        assert torch.equal(together[1, :length], alone[0, :length])


def test_a_call_with_a_cache_of_another_call_is_refused(make_model):
    with lw.experts("octavius", make_model("llama")) as made:
        cache = made(input_ids=IDS_BT, use_cache=True).past_key_values
        with pytest.raises(ScopeError, match=r"use the model's own generate\(\)"):
            made(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)


def test_a_row_without_a_prompt_is_refused_by_its_number(make_model):
    labels_BT = IDS_BT.clone()
    labels_BT[0, :2] = -100
    with (
        lw.experts("octavius", make_model("llama")) as made,
        pytest.raises(ScopeError, match=r"row 1 has none, .* to -100"),
    ):
        made(input_ids=IDS_BT, labels=labels_BT)
