"""More experts in higher layers, each token's best two."""

import pytest
import torch
from rounding import assert_near, num_terms

import loraweave as lw
from loraweave.errors import UnknownName


def test_each_group_of_blocks_has_its_number_of_experts(make_model):
    with lw.experts(
        "mola", make_model("llama", num_hidden_layers=5), num_experts=(2, 3), target_modules=("q_proj",)
    ) as made:
        assert [layer.shape.num_experts for layer in made.layers.values()] == [2, 2, 2, 3, 3]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_one_expert_equals_a_lora_of_peft(make_model):
    from peft import LoraConfig, get_peft_model

    model, inputs = make_model("llama", dtype=torch.float64), {"input_ids": torch.tensor([[3, 9, 27, 20, 11]])}
    with lw.experts("mola", model, num_experts=(1,), top_k=1, rank=3, alpha=5.0, target_modules=("v_proj",)) as made:
        torch.manual_seed(0)
        for layer in made.layers.values():
            torch.nn.init.normal_(layer.b_SO)
        own = made(**inputs).logits
        adapter = made.expert(0)
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=5.0, target_modules=["v_proj"])).double()
    for name, factors in adapter.layers.items():
        module = peft.get_submodule(f"base_model.model.{name}")
        module.lora_A["default"].weight.data.copy_(factors.a_RI)
        module.lora_B["default"].weight.data.copy_(factors.b_OR / (5.0 / 3))
    # an adapter's factors are in fp32
    assert_near(peft(**inputs).logits, own, num_terms(model), dtype=torch.float32)


def test_an_expert_is_an_adapter_like_any_other(make_model, tmp_path):
    with lw.experts("mola", make_model("llama"), num_experts=(2, 3)) as made:
        for layer in made.layers.values():
            torch.nn.init.normal_(layer.b_SO)
        hub = lw.Hub(tmp_path / "hub")
        hub.add(made.expert(1))
        assert hub["mola-1"].hash == made.expert(1).hash
        # the first block has two experts
        assert len(made.expert(2).layers) == 7
        with pytest.raises(UnknownName, match="no expert 3; its experts are 0 to 2"):
            made.expert(3)


def test_a_pattern_that_matches_nothing_says_what_there_is(make_model):
    with pytest.raises(UnknownName, match=r"no layer matches 'query' .* end in down_proj, gate_proj"):
        lw.experts("mola", make_model("llama"), target_modules=("query",))


def test_the_balance_loss_is_added_in_training_alone(make_model):
    ids_BT = torch.tensor([[3, 9, 27, 20]])
    with lw.experts("mola", make_model("llama"), num_experts=(2, 4), balance=0.5) as made:
        plain = made(input_ids=ids_BT, labels=ids_BT).loss
        assert not made.terms
        with_balance = made.train()(input_ids=ids_BT, labels=ids_BT).loss
        torch.testing.assert_close(with_balance, plain + made.terms["balance"])
    with lw.experts("mola", make_model("llama"), num_experts=(2, 4), balance=0.0) as made:
        assert made.train()(input_ids=ids_BT, labels=ids_BT)
        assert not made.terms


@pytest.mark.parametrize("as_released", [False, True])
def test_the_balance_loss_is_the_sum_over_blocks_of_the_released_codes(make_model, trained, as_released):
    """For each block E * sum over e of s_e p_e over the tokens of all its sites, s_e the share of e of all choices."""
    model = make_model("llama", num_hidden_layers=3, dtype=torch.float64)
    ids_BT = torch.tensor([[0, 3, 9, 27, 20], [6, 2, 25, 3, 15]])
    real_BT = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {
        "num_experts": (3, 3, 5),
        "balance": 0.01,
        "as_released": as_released,
        "target_modules": ("q_proj", "lm_head"),
    }
    with lw.experts("mola", model, **options) as made:
        trained(made).train()(input_ids=ids_BT, attention_mask=real_BT, labels=ids_BT)
        expected = 0.0
        # a layer outside the blocks counts as one
        for scores_BTE, num_experts in zip(made.notes.scores.values(), (3, 3, 5, 5), strict=True):
            p_NE = scores_BTE.detach().flatten(0, 1).softmax(dim=1)
            # the released code knows nothing of padding
            p_NE = p_NE if as_released else p_NE[real_BT.flatten().bool()]
            chosen = p_NE.topk(2).indices.flatten().tolist()
            share_E = torch.tensor([chosen.count(expert) / len(chosen) for expert in range(num_experts)])
            expected += num_experts * float((share_E * p_NE.mean(dim=0)).sum())
        assert float(made.terms["balance"].detach()) == pytest.approx(0.01 * expected, rel=1e-6)


def test_the_sites_of_a_block_are_balanced_together(make_model, trained):
    ids_BT = torch.tensor([[3, 9, 27, 20]])
    options = {"num_experts": (3, 4), "balance": 1.0, "top_k": 1, "target_modules": ("q_proj", "down_proj")}
    with lw.experts("mola", make_model("llama", dtype=torch.float64), **options) as made:
        trained(made).train()(input_ids=ids_BT, labels=ids_BT)
        scores, expected = made.notes.scores, 0.0
        for block, num_experts in enumerate((3, 4)):
            p_NE = torch.cat([own[0] for site, own in scores.items() if f".{block}." in site]).softmax(dim=1)
            assert len(p_NE) == 8
            share_E = torch.nn.functional.one_hot(p_NE.argmax(dim=1), num_experts).double().mean(dim=0)
            expected = expected + num_experts * (share_E * p_NE.mean(dim=0)).sum()
        torch.testing.assert_close(made.terms["balance"], expected)


def test_the_published_balance_is_as_strong_as_the_released_codes_on_as_many_blocks(make_model):
    """Where all experts are alike, which is where training begins, a block's loss is 1 whatever the number of sites."""
    ids_BT = torch.tensor([[3, 9, 27, 20]])
    with lw.experts("mola", make_model("llama", num_hidden_layers=4)) as made:
        for gate in made.gates.values():
            torch.nn.init.zeros_(gate.r_EI)
        made.train()(input_ids=ids_BT, labels=ids_BT)
        assert float(made.terms["balance"].detach()) == pytest.approx(0.001 * 4)
