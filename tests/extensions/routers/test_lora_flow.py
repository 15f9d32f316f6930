"""LoRA-Flow's gates on the inputs of blocks, against the formula written out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from rounding import assert_near, num_terms

from loraweave.composer.composer import Composer
from loraweave.errors import LayerMismatch, ScopeError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._call import block_of
from loraweave.routers.tokens._saved import router

IDS_BT = torch.tensor([[5, 9, 11, 2, 30], [8, 8, 7, 8, 3]])


def trained(pool, **options):
    torch.manual_seed(2)
    made = router("lora_flow", pool, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def block_inputs(model, ids_BT):
    """{path: hidden states} that the blocks are given in a call."""
    seen = {}
    hooks = [
        block.register_forward_pre_hook(lambda _, args, path=f"model.layers.{number}": seen.update({path: args[0]}))
        for number, block in enumerate(model.model.layers)
    ]
    model(ids_BT)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("bias", ["outside", "inside"])
def test_weights_are_the_softmax_of_the_gate_on_the_blocks_input_and_the_bias(model, pool, bias):
    made, engine = trained(pool, bias=bias), Composer(model, pool)
    with torch.no_grad(), engine.activate(made):
        seen = block_inputs(model, IDS_BT)
        used = engine.last_weights
    for layer in made.layers:
        if (block := block_of(layer)) is None:
            continue
        first = min(name for name in made.layers if block_of(name) == block)
        scores_BTE = seen[block] @ made.gates_[first].detach().T
        c_E = made.biases_[first].detach()
        w_BTE = scores_BTE.softmax(dim=-1) + c_E if bias == "outside" else (scores_BTE + c_E).softmax(dim=-1)
        for place, name in enumerate(pool.names):
            expected_BT = w_BTE[..., place] if layer in pool[name].layers else torch.zeros(IDS_BT.shape)
            assert torch.allclose(used[layer][..., place], expected_BT, atol=1e-5), (layer, name)


def test_it_begins_uniform_with_so_many_numbers_a_block(model, pool):
    made, engine = router("lora_flow", pool), Composer(model, pool)
    # two blocks of width 16, and the language head
    assert sum(parameter.numel() for parameter in made.parameters()) == 3 * (3 * 16 + 3)
    with torch.no_grad(), engine.activate(made):
        model(IDS_BT)
        used = engine.last_weights
    w_BTE = used["model.layers.0.self_attn.v_proj"]
    assert torch.allclose(w_BTE, torch.full_like(w_BTE, 1 / 3))


def test_a_block_of_which_some_number_fits_no_layer_alone_needs_its_width(model, make_adapter):
    pool = ExpertPool([make_adapter(model, name, targets=("v_proj", "down_proj")) for name in ("a", "b")])
    assert router("lora_flow", pool).gates_["model.layers.0.mlp.down_proj"].shape == (2, 16)
    down = ExpertPool([make_adapter(model, name, targets=("down_proj",)) for name in ("a", "b")])
    with (
        torch.no_grad(),
        pytest.raises(LayerMismatch, match=r"width=16"),
        Composer(model, down).activate(router("lora_flow", down)),
    ):
        model(IDS_BT)
    with torch.no_grad(), Composer(model, down).activate(router("lora_flow", down, width=16)):
        model(IDS_BT)


def test_blocks_are_as_they_were_after_the_activation_and_after_an_error(model, pool):
    before = [dict(vars(block)) for block in model.model.layers]
    with Composer(model, pool).activate(trained(pool)):
        model(IDS_BT)
    assert [dict(vars(block)) for block in model.model.layers] == before

    def interrupted(*_):
        raise RuntimeError("stop")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(interrupted)
    with pytest.raises(RuntimeError, match="stop"), Composer(model, pool).activate(trained(pool)):
        model(IDS_BT)
    hook.remove()
    assert [sorted(vars(block)) for block in model.model.layers] == [sorted(each) for each in before]


def test_a_copy_of_the_model_made_while_it_is_active_is_the_base(model, pool):
    with torch.no_grad():
        expected = model(IDS_BT).logits
        with Composer(model, pool).activate(trained(pool)):
            copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for copied in copies:
            assert torch.equal(copied(IDS_BT).logits, expected)


def test_a_layer_outside_a_call_of_its_block_is_refused(model, pool):
    with Composer(model, pool).activate(trained(pool)), pytest.raises(ScopeError, match=r"ran in no call of it"):
        model.model.layers[0].self_attn.q_proj(torch.ones(1, 2, 16))


def test_in_a_list_of_mixtures_a_row_has_the_weights_that_it_has_alone(model, pool):
    made, other, engine = trained(pool), router("arrow", pool), Composer(model, pool)
    rows = torch.cat([IDS_BT, IDS_BT.flip(1)])[:3]

    def logits(mixture, ids_BT):
        with torch.no_grad(), engine.activate(mixture):
            return model(ids_BT).logits

    # each row three times, as a batch with beams has it
    found = logits([made, other, made.onto(pool)], rows.repeat_interleave(3, dim=0))
    for number, mixture in enumerate([made, other, made]):
        alone = logits(mixture, rows[number : number + 1])
        assert_near(found[3 * number : 3 * number + 3], alone.expand(3, -1, -1), num_terms(model))
    assert_near(logits([None, made], rows[:2])[0], logits({}, rows[:1])[0], num_terms(model))


@pytest.mark.parametrize("num_targets", [3, 5])
def test_cross_attention_is_refused_also_where_both_texts_are_as_long(make_model, make_adapter, num_targets):
    model = make_model("t5")
    pool = ExpertPool([make_adapter(model, name, targets=("v",)) for name in ("a", "b")])
    made = trained(pool)
    with torch.no_grad(), Composer(model, pool).activate(made), pytest.raises(ScopeError, match="EncDecAttention"):
        model(input_ids=IDS_BT, decoder_input_ids=IDS_BT[:, :num_targets])
