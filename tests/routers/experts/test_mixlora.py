"""Each token's best few of feed-forward blocks, and their balance loss."""

import pytest
import torch
from torch.nn import functional

import loraweave as lw
from loraweave.errors import WeightingError


def test_a_block_gives_its_formula(make_model):
    model = make_model("llama", dtype=torch.float64)
    name = "model.layers.1.mlp"
    with lw.experts("mixlora", model, num_experts=3, rank=2, alpha=5.0, target_modules=(name,)) as made:
        torch.manual_seed(0)
        key = name.replace(".", "/")
        parts, gate, block = made.layers[key].parts, made.gates[key], model.get_submodule(name)
        for factors in parts.values():
            torch.nn.init.normal_(factors.b_SO)
        torch.nn.init.normal_(gate.r_EI)
        seen = {}
        block.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
        made(input_ids=torch.tensor([[3, 9, 27, 20]]))

        def changed(layer, expert, x_I):
            a_RI, b_RO = (tensor[2 * expert : 2 * expert + 2] for tensor in (parts[layer].a_SI, parts[layer].b_SO))
            return block.get_submodule(layer).weight @ x_I + 5.0 / 2 * (b_RO.T @ (a_RI @ x_I))

        for x_I, y_O in zip(seen["x"][0], seen["y"][0], strict=True):
            p_E = functional.softmax(gate.r_EI @ x_I, dim=0)
            best = p_E.topk(2).indices
            expected_O = 0
            for expert in best.tolist():
                h_F = functional.silu(changed("gate_proj", expert, x_I)) * changed("up_proj", expert, x_I)
                expected_O = expected_O + p_E[expert] / p_E[best].sum() * changed("down_proj", expert, h_F)
            torch.testing.assert_close(y_O, expected_O)


def test_its_gates_begin_as_small_normal_numbers(make_model):
    with lw.experts("mixlora", make_model("llama", hidden_size=256), num_experts=64, top_k=2) as made:
        r_EI = made.gates["model/layers/0/mlp"].r_EI.detach()
        assert float(r_EI.std()) == pytest.approx(0.02, rel=0.05)
        assert float(r_EI.mean()) == pytest.approx(0.0, abs=1e-3)


def test_the_balance_loss_is_the_mean_over_blocks(make_model):
    ids_BT = torch.tensor([[3, 9, 27, 20]])
    with lw.experts("mixlora", make_model("llama"), balance=0.5) as made:
        for gate in made.gates.values():
            torch.nn.init.zeros_(gate.r_EI)
        made.train()(input_ids=ids_BT, labels=ids_BT)
        # all experts alike: k
        torch.testing.assert_close(made.terms["balance"].detach(), torch.tensor(0.5 * 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts of recipe 'mixlora' is 0"),
        ({"num_experts": 2, "top_k": 3}, r"top_k of recipe 'mixlora' is 3: .* from 1 to the number of experts, 2"),
        ({"balance": -1.0}, "balance of recipe 'mixlora' is -1.0"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make_model, options, message):
    with pytest.raises(WeightingError, match=message):
        lw.experts("mixlora", make_model("llama"), **options)
