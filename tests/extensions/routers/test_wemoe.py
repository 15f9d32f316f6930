"""WEMoE: an MLP whose weights are merged densely, the gate written out, and a training by entropy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.composer.model.batches import IGNORED, entropies_of
from loraweave.errors import LayerMismatch, ScopeError, TrainingError, WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._saved import router

IDS_BT = torch.tensor([[5, 9, 11, 2, 30], [0, 0, 7, 8, 3]])
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
MLP = "model.layers.0.mlp"


@pytest.fixture
def pool(model, make_adapter):
    targets = {"a": ("q_proj", "gate_proj", "down_proj"), "b": ("up_proj", "down_proj"), "c": ("gate_proj", "v_proj")}
    return ExpertPool([make_adapter(model, name, targets=own, seed=len(own)) for name, own in targets.items()])


def trained(pool, **options):
    torch.manual_seed(2)
    made = router("wemoe", pool, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return made


def gate(made, h_I):
    """w_E for an MLP's input, from the router's tensors in numpy."""
    w, c, *more = [parameter.detach().double().numpy() for parameter in made.gates_[MLP.replace(".", "/")].parameters()]
    out = w @ h_I.double().numpy() + c
    return more[0] @ np.maximum(out, 0) + more[1] if more else out


def run(model, pool, made, ids_BT=IDS_BT, mask_BT=MASK_BT):
    """What the first MLP was given and gave, and the weights of all layers."""
    seen, engine = [], Composer(model, pool)
    with torch.no_grad(), engine.activate(made):
        handle = model.get_submodule(MLP).register_forward_hook(lambda _, given, output: seen.extend([given[0], output]))
        model(input_ids=ids_BT, attention_mask=mask_BT)
        handle.remove()
        return *seen, engine.last_weights


@pytest.mark.parametrize("depth", [1, 2])
def test_an_mlp_gives_what_one_with_merged_weights_gives(model, pool, depth):
    made = trained(pool, depth=depth)
    h_BTI, found_BTI, _ = run(model, pool, made, IDS_BT[:, 2:3], MASK_BT[:, 2:3])
    for row in range(2):
        w_E, merged = gate(made, h_BTI[row, 0]), copy.deepcopy(model.get_submodule(MLP)).double()
        for name, w in zip(pool.names, w_E.tolist(), strict=True):
            for layer, factors in pool[name].layers.items():
                if layer.startswith(MLP):
                    weight = merged.get_submodule(layer.rpartition(".")[2]).weight.data
                    weight += w * factors.b_OR.double() @ factors.a_RI.double()
        with torch.no_grad():
            assert torch.allclose(merged(h_BTI[row].double()).float(), found_BTI[row], atol=1e-5)


def test_layers_of_an_mlp_share_the_mean_over_the_real_tokens_so_far(model, pool):
    made = trained(pool)
    h_BTI, _, used = run(model, pool, made)
    by_token = trained(pool, decision="token")
    h2_BTI, _, apart = run(model, pool, by_token)
    for row, t in np.argwhere(MASK_BT.numpy() == 1):
        real = [s for s in range(t + 1) if MASK_BT[row, s]]
        expected_E = np.mean([gate(made, h_BTI[row, s]) for s in real], axis=0)
        for layer in (name for name in made.layers if name.startswith(MLP)):
            there = np.array([layer in pool[name].layers for name in pool.names])
            assert np.allclose(used[layer][row, t].numpy(), expected_E * there, atol=1e-5)
            assert np.allclose(apart[layer][row, t].numpy(), gate(by_token, h2_BTI[row, t]) * there, atol=1e-5)


def test_layers_outside_have_the_start_and_so_have_all_at_first_but_for_the_draw(model, pool):
    torch.manual_seed(2)
    made = router("wemoe", pool, start=0.4)
    _, _, used = run(model, pool, made)
    outside = used["model.layers.1.self_attn.q_proj"][MASK_BT.bool()]
    assert torch.allclose(outside, torch.tensor([0.4, 0.0, 0.0]).expand_as(outside))
    for layer in made.layers:
        weights = used[layer][MASK_BT.bool()]
        assert bool(((weights == 0) | ((weights - 0.4).abs() < 0.1)).all())


def test_beside_a_router_that_looks_at_the_blocks_around_it_each_sees_its_own(model, pool):
    made, flow = trained(pool), router("lora_flow", pool, width=16)
    engine = Composer(model, pool)
    ids_BT = IDS_BT[:1].expand(2, -1)
    with torch.no_grad(), engine.activate([made, flow]):
        model(input_ids=ids_BT)
        used = engine.last_weights[f"{MLP}.down_proj"]
    _, _, alone = run(model, pool, made, ids_BT, torch.ones_like(ids_BT))
    assert torch.allclose(used[0], alone[f"{MLP}.down_proj"][0], atol=1e-5)
    # lora_flow begins uniform
    assert torch.allclose(used[1], torch.tensor([1 / 3, 1 / 3, 0.0]).expand(5, 3))


def test_an_entropy_is_that_of_a_categorical_distribution_wherever_there_is_a_target():
    logits_BKV = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)) * 3
    targets_BK = torch.tensor([[1, 2, IGNORED], [IGNORED, 0, 6]])
    expected = torch.distributions.Categorical(logits=logits_BKV).entropy() * (targets_BK != IGNORED)
    assert torch.allclose(entropies_of(logits_BKV, targets_BK), expected)


def test_fit_by_entropy_makes_predictions_surer_whatever_the_targets_say(model, pool, tokenizer):
    rows, steps = [("a b", "c"), ("b", "d"), ("c a", "a")], {"steps": 8, "lr": 0.05, "batch_size": 3, "progress": False}
    found = []
    for answers in ("c", "b"):
        torch.manual_seed(0)
        made = router("wemoe", pool)
        given = [(text, answers) for text, _ in rows]
        Composer(model, pool, tokenizer=tokenizer).fit(made, given, loss="entropy", **steps)
        found.append(made.training_report.losses)
        assert found[-1][-1] < found[-1][0] <= np.log(61)
    engine = Composer(model, pool, tokenizer=tokenizer)
    with pytest.raises(TrainingError, match="loss='surprise'"):
        engine.fit(router("wemoe", pool), rows, loss="surprise", **steps)


@pytest.mark.own_models
def test_what_cannot_be_meant_is_refused_by_name(model, pool, make_adapter):
    attention = ExpertPool([make_adapter(model, "a", targets=("q_proj",))])
    with pytest.raises(WeightingError, match="no layer of the pool lies in a module named 'mlp'"):
        router("wemoe", attention)
    with pytest.raises(LayerMismatch, match="hidden_size=16"):
        run(model, pool, router("wemoe", pool, hidden_size=24))
    with pytest.raises(ScopeError, match="'wemoe' decides by the tokens so far"):
        router("wemoe", pool).weights(torch.zeros(1, 1, 16), f"{MLP}.up_proj")
    with pytest.raises(WeightingError, match="depth=3"):
        router("wemoe", pool, depth=3)
