"""RAMoLE's attention over sets of experts, against the formula with all outputs formed."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_models import random_adapter

from loraweave.composer.composer import Composer
from loraweave.errors import BaseModelMismatch, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._learned import Step
from loraweave.routers.tokens._saved import router
from loraweave.types import Factors

LAYER = "q"


def adapter(name, seed, ranks):
    """Return an adapter of small factors; `ranks` are by layer."""
    sizes = {LAYER: 12, "v": 7, "o": 5}
    drawn = random_adapter(name, {layer: (rank, 20, sizes[layer]) for layer, rank in ranks.items()}, seed)
    quarter = {layer: Factors(part.a_RI / 4, part.b_OR / 4) for layer, part in drawn.layers.items()}
    return replace(drawn, layers=quarter)


@pytest.fixture
def pool():
    ranks = ({LAYER: 4}, {LAYER: 2, "v": 3}, {LAYER: 30}, {LAYER: 1, "v": 2})
    return ExpertPool([adapter(f"e{place}", place, own) for place, own in enumerate(ranks)])


@pytest.fixture
def engine_of_four(make_model, make_adapter):
    """(engine, made_of): of four experts, so that there is something to leave out, and routers drawn alike."""
    model = make_model("llama").requires_grad_(False)
    adapters = [make_adapter(model, name, targets=("q_proj", "down_proj"), seed=at) for at, name in enumerate("abcd")]
    pool = ExpertPool(adapters)

    def made_of():
        torch.manual_seed(2)
        return router("ramole", pool)

    return Composer(model, pool), made_of


@pytest.fixture
def trained(trained_router):
    return partial(trained_router, "ramole")


def written_out(pool, made, x_BTI, layer):
    """Scores of the experts of a layer: (A_r x) . (B_r^T E_e(x)) / sqrt(r), each output formed."""
    a_RI, b_OR = made.queries_[layer].detach(), made.keys_[layer].detach().T
    scores = []
    for each in pool.adapters.values():
        scores.append(torch.full(x_BTI.shape[:2], -math.inf, dtype=torch.float64))
        if layer in each.layers:
            part = each.layers[layer]
            output_BTO = x_BTI @ part.a_RI.double().T @ part.b_OR.double().T
            scores[-1] = ((x_BTI @ a_RI.T) * (output_BTO @ b_OR)).sum(dim=-1) / math.sqrt(len(a_RI))
    return torch.stack(scores, dim=-1)


@pytest.mark.parametrize("num_tokens", [1, 7, 200])
@pytest.mark.parametrize("rank", [1, 8, 30])
@pytest.mark.parametrize("layer", [LAYER, "v"])
def test_weights_are_the_attention_of_the_router_lora_over_the_outputs(pool, layer, rank, num_tokens, trained):
    x_BTI = torch.randn(2, num_tokens, 20, dtype=torch.float64)
    made = trained(pool, rank=rank)
    expected = written_out(pool, made, x_BTI, layer).softmax(dim=-1)
    assert torch.allclose(made.weights(x_BTI, layer), expected, atol=1e-5)


def test_a_new_router_weighs_all_alike_and_its_keys_have_a_gradient(pool, x_BTI):
    made = router("ramole", pool)
    w_BTE = made.weights(x_BTI, LAYER)
    assert torch.equal(w_BTE, torch.full_like(w_BTE, 1 / 4))
    w_BTE[..., 0].sum().backward()
    assert bool(made.keys_[LAYER].grad.any())
    # which is why fit() does not ask for one at the first step
    assert not bool(made.queries_[LAYER].grad.any())
    assert made.silent_at_first == ("queries_",)


def test_its_query_starts_as_the_first_matrix_of_a_lora(pool):
    found = router("ramole", pool, rank=64).queries_[LAYER].detach()
    bound = 1 / math.sqrt(20)
    assert float(found.abs().max()) <= bound
    # of a uniform distribution, whose standard deviation is bound / sqrt(3): five times what that of n numbers parts
    assert float(found.std()) == pytest.approx(bound / math.sqrt(3), rel=5 / math.sqrt(5 * found.numel()))


def test_gradients_are_those_of_finite_differences(pool, x_BTI, has_exact_gradients, trained):
    names = (f"queries_.{LAYER}", f"keys_.{LAYER}")
    assert has_exact_gradients(trained(pool, rank=2), LAYER, x_BTI[:1, :2], names)


def test_an_expert_that_was_never_trained_joins_and_the_others_keep_their_ratios(pool, x_BTI, trained):
    made = trained(pool)
    new = adapter("new", 9, {LAYER: 5, "v": 2})
    before, after = made.weights(x_BTI, LAYER), made.add_expert("new", new).weights(x_BTI, LAYER)
    larger = pool.including("new", new)
    assert torch.allclose(after, written_out(larger, made, x_BTI, LAYER).softmax(dim=-1), atol=1e-5)
    kept = after[..., :4] / after[..., :4].sum(dim=-1, keepdim=True)
    assert torch.allclose(kept, before, atol=1e-9)
    assert torch.equal(made.for_pool(larger).weights(x_BTI, LAYER), after)


def test_without_an_expert_the_others_keep_their_ratios(pool, x_BTI, trained):
    made = trained(pool)
    before, after = made.weights(x_BTI, LAYER)[..., [0, 1, 3]], made.remove_expert("e2").weights(x_BTI, LAYER)
    assert torch.allclose(after, before / before.sum(dim=-1, keepdim=True), atol=1e-9)


def test_layers_that_join_weigh_alike_and_are_saved(pool, x_BTI, tmp_path, trained):
    grown = trained(pool).add_expert("n1", adapter("n1", 9, {LAYER: 2, "o": 2}))
    grown = grown.add_expert("n2", adapter("n2", 10, {"o": 4}))
    found = grown.weights(x_BTI, "o")
    assert torch.equal(found[..., 4:], torch.full_like(found[..., 4:], 1 / 2))
    assert not bool(found[..., :4].any())
    grown.save_pretrained(tmp_path / "router")
    again = router(tmp_path / "router")
    assert torch.equal(again.weights(x_BTI, LAYER), grown.weights(x_BTI, LAYER))
    left = grown.remove_expert("e1").remove_expert("e3")
    assert set(left.queries_) == {LAYER, "o"}
    left.save_pretrained(tmp_path / "left")
    assert router(tmp_path / "left").experts == ("e0", "e2", "n1", "n2")


def test_in_train_mode_rows_leave_out_half_of_the_experts_but_never_all(pool, trained):
    made = trained(pool).train()
    x_BTI = torch.randn(4000, 2, 20, dtype=torch.float64)
    full, found = made.eval().weights(x_BTI, LAYER), made.train().weights(x_BTI, LAYER)
    stays_BE = found[:, 0] > 0
    # all tokens of a row have the same candidates, and each has the ratios that it has among all
    assert torch.equal(stays_BE, found[:, 1] > 0)
    kept = torch.where(stays_BE[:, None], full, 0.0)
    assert torch.allclose(found, kept / kept.sum(dim=-1, keepdim=True), atol=1e-9)
    counts = stays_BE.sum(dim=1)
    assert int(counts.min()) == 2
    # of 4 with probability one half each: 1, 4 and 6, 4, 1 in 16 have 0, 1, 2, 3 and 4; those below 2 become 2
    expected = torch.tensor([0, 0, 11, 4, 1]) / 16
    assert torch.allclose(counts.bincount(minlength=5) / 4000, expected, atol=0.03)
    assert torch.equal(made.eval().weights(x_BTI, LAYER), full)
    assert not router("ramole", pool).training


def test_without_dropout_training_sees_all_experts(pool, x_BTI, trained):
    made = trained(pool, dropout=0.0)
    assert torch.equal(made.train().weights(x_BTI, LAYER), made.eval().weights(x_BTI, LAYER))


def test_pools_of_other_layers_or_another_base_are_refused_by_name(pool):
    with pytest.raises(
        WeightingError, match="trained for 2 layers, the first 'q', but the pool updates 1 others, the first 'o'"
    ):
        router("ramole", pool).for_pool(ExpertPool([adapter("new", 9, {"o": 2})]))
    other = Adapter("new", "another", {LAYER: pool.adapters["e0"].layers[LAYER]})
    with pytest.raises(BaseModelMismatch, match="another"):
        router("ramole", pool).for_pool(ExpertPool([other]))


def test_a_step_in_several_passes_leaves_out_the_same_experts(engine_of_four):
    engine, made_of = engine_of_four
    rows = [{"input_ids": [5, 9, 11, 30, 7][:count], "labels": [5, 9, 11, 30, 7][:count]} for count in (5, 2, 4, 3, 5)]
    settings = {"steps": 3, "batch_size": 5, "lr": 0.1, "seed": 4, "progress": False}
    plain = made_of().fit(engine, rows, **settings).state_dict()
    split = made_of().fit(engine, rows, gradient_accumulation=3, **settings).state_dict()
    other = made_of().fit(engine, rows, **{**settings, "seed": 5}).state_dict()
    assert all(torch.allclose(split[name], value, atol=1e-4) for name, value in plain.items())
    assert not all(torch.allclose(other[name], value, atol=1e-2) for name, value in plain.items())


def test_in_a_training_each_row_and_each_layer_leaves_out_experts_of_its_own(pool, trained):
    made = trained(pool).train()
    x_BTI = torch.randn(1, 1, 20, dtype=torch.float64).expand(4000, 1, 20)
    made.step = Step(torch.ones(4000, 1), torch.full((4000,), -1), seeds_B=tuple(range(4000)))
    found = made.weights(x_BTI, LAYER)[:, 0] > 0
    counts = found.sum(dim=1).bincount(minlength=5) / 4000
    # as above: of 4 with probability one half each, but never fewer than two
    assert torch.allclose(counts, torch.tensor([0, 0, 11, 4, 1]) / 16, atol=0.03)
    assert torch.equal(made.weights(x_BTI, LAYER)[:, 0] > 0, found)
    made.step = Step(torch.ones(2, 1), torch.full((2,), -1), seeds_B=(7, 7))
    assert torch.equal(*made.weights(x_BTI[:2], LAYER))
