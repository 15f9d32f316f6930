"""Each token's best few of feed-forward blocks, and their balance loss."""

import pytest
import torch
from torch.nn import functional

import loraweave as lw


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


def block_of(made, name="model.layers.1.mlp"):
    """What a block sees and gives, its experts' own outputs and softmax(r x), with values that matter."""
    generator, key = torch.Generator().manual_seed(0), name.replace(".", "/")
    with torch.no_grad():
        for parameter in made.expert_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    seen, block, parts = {}, made.base_model.get_submodule(name), made.layers[key].parts
    watch = block.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    made(input_ids=torch.tensor([[3, 9, 27, 20, 44]]))
    watch.remove()
    x_TI, rank, scale = seen["x"][0], made.recipe.rank, made.recipe.scale
    experts = []
    for expert in range(made.recipe.num_experts):
        rows = slice(rank * expert, rank * expert + rank)
        merged = {
            f"{part}.weight": block.get_submodule(part).weight + scale * each.b_SO[rows].T @ each.a_SI[rows]
            for part, each in parts.items()
        }
        experts.append(torch.func.functional_call(block, merged, (x_TI,)))
    return x_TI, seen["y"][0], torch.stack(experts), (x_TI @ made.gates[key].r_EI.T).softmax(dim=-1), block


def test_by_top_p_a_token_has_the_fewest_that_suffice(make_model):
    with lw.experts("mixlora", make_model("llama", dtype=torch.float64), num_experts=4, rank=1, routing="top_p") as made:
        _, y_TO, experts_ETO, p_TE, _ = block_of(made)
        for token, p_E in enumerate(p_TE):
            order, kept = p_E.argsort(descending=True).tolist(), []
            while sum(float(p_E[expert].detach()) for expert in kept) < 0.8:
                kept.append(order.pop(0))
            expected_O = sum(p_E[expert] * experts_ETO[expert, token] for expert in kept) / p_E[kept].sum()
            torch.testing.assert_close(y_TO[token], expected_O)


def test_by_switch_the_frozen_block_has_the_rest(make_model):
    model = make_model("llama", dtype=torch.float64)
    with lw.experts("mixlora", model, num_experts=3, rank=1, routing="switch") as made:
        x_TI, y_TO, experts_ETO, p_TE, block = block_of(made)
        frozen_TO = block(x_TI)
        for token, p_E in enumerate(p_TE):
            best = int(p_E.argmax())
            expected_O = p_E[best] * experts_ETO[best, token] + (1 - p_E[best]) * frozen_TO[token]
            torch.testing.assert_close(y_TO[token], expected_O)


def test_by_switch_the_frozen_block_has_what_is_above_capacity_in_training(make_model):
    model = make_model("llama", dtype=torch.float64)
    ids_BT = torch.tensor([[3, 3, 3, 3]])
    with lw.experts("mixlora", model, num_experts=2, rank=1, routing="switch", capacity=0.5) as made:
        torch.manual_seed(0)
        for parameter in made.expert_parameters().values():
            torch.nn.init.normal_(parameter)
        rows = {}
        made.base_model.model.layers[0].mlp.register_forward_hook(lambda module, args, y: rows.update(x=args[0], y=y))
        made.train()(input_ids=ids_BT)
        # of four tokens alike, an expert may have half of its even share of two
        changed_T = (rows["y"] - made.base_model.model.layers[0].mlp(rows["x"])).abs().amax(dim=-1)[0] > 1e-9
        assert changed_T.tolist() == [True, False, False, False]
        made.eval()(input_ids=ids_BT)
        changed_T = (rows["y"] - made.base_model.model.layers[0].mlp(rows["x"])).abs().amax(dim=-1)[0] > 1e-9
        assert changed_T.all()


def test_by_top_p_the_balance_loss_counts_all_experts_of_a_token(make_model):
    ids_BT = torch.tensor([[3, 9, 27, 20]])
    model = make_model("llama")
    with lw.experts("mixlora", model, num_experts=5, routing="top_p", top_p=0.5, balance=1.0) as made:
        for gate in made.gates.values():
            torch.nn.init.zeros_(gate.r_EI)
        made.train()(input_ids=ids_BT)
        # alike: three of five suffice, of a probability of a fifth each
        torch.testing.assert_close(made.terms["balance"].detach(), torch.tensor(3.0))


def test_by_switch_scores_are_kept_small(make_model):
    ids_BT = torch.tensor([[3, 9, 27, 20]])
    with lw.experts("mixlora", make_model("llama"), num_experts=4, routing="switch", balance=0.0, z=0.5) as made:
        for gate in made.gates.values():
            torch.nn.init.zeros_(gate.r_EI)
        made.train()(input_ids=ids_BT)
        assert list(made.terms) == ["z"]
        torch.testing.assert_close(made.terms["z"].detach(), 0.5 * torch.tensor(4.0).log().square())
