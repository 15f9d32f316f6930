"""PHATGOOSE's gates, against the formula written out, and each trained alone."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._learned import Step
from loraweave.routers.tokens._saved import router

SIZE = 20
DATA = {
    "a": [("abc", "cba"), ("ba", "ab"), ("dog", "god"), ("tip", "pit")],
    "b": [("one", "1"), ("two", "2"), ("three", "3")],
    "c": [("cat", "cats"), ("apple", "apples"), ("bird", "birds")],
}


@pytest.fixture
def pool(random_pool):
    every = {"q": (2, SIZE, 12), "v": (2, SIZE, 12)}
    return random_pool(every, {"q": (2, SIZE, 12)}, every, every)


@pytest.fixture
def x_BTI(x_BTI):
    return 3 * x_BTI + 1


@pytest.fixture
def trained(trained_router):
    # gates begin as zeros
    return partial(trained_router, "phatgoose")


def centred(v_I):
    """A layer norm without parameters."""
    v_I = v_I - v_I.mean()
    return v_I / ((v_I**2).mean() + 1e-5).sqrt()


@pytest.mark.parametrize(("layer", "present"), [("q", [0, 1, 2, 3]), ("v", [0, 2, 3])])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_weights_are_the_softmax_over_the_best_products_of_the_two_layer_norms(pool, x_BTI, layer, present, top_k, trained):
    made = trained(pool, top_k=top_k)
    v_EI = made.gates_[layer].detach()
    w_BTE = made.weights(x_BTI, layer)
    for b in range(2):
        for t in range(5):
            scores = {e: float(centred(x_BTI[b, t]) @ centred(v_EI[e])) / math.sqrt(SIZE) for e in present}
            best = sorted(present, key=scores.get)[-top_k:]
            total = sum(math.exp(scores[e]) for e in best)
            expected = [math.exp(scores[e]) / total if e in best else 0.0 for e in range(4)]
            assert w_BTE[b, t].tolist() == pytest.approx(expected, abs=1e-9)


def test_scores_are_at_most_the_root_of_the_number_of_inputs(pool, trained):
    made = trained(pool, top_k=4)
    # a token along a gate
    w_E = made.weights(1e4 * made.gates_["q"].detach()[2][None, None], "q")[0, 0].detach()
    largest = float(w_E.max() / w_E.min())
    assert w_E.argmax() == 2
    assert largest < math.exp(2 * math.sqrt(SIZE))


def test_the_only_expert_gets_all(pool, x_BTI):
    made = router("phatgoose", pool.subset(["e1"])).double()
    assert made.options == {"top_k": 1}
    assert torch.equal(made.weights(x_BTI, "q"), torch.ones(2, 5, 1, dtype=torch.float64))
    with torch.no_grad():
        made.gates_["q"].normal_()
    assert torch.equal(made.weights(x_BTI, "q"), torch.ones(2, 5, 1, dtype=torch.float64))


def test_untrained_gates_give_nothing_beside_trained_ones_and_weigh_alike_among_themselves(pool, x_BTI):
    made = router("phatgoose", pool, top_k=1).double()
    assert torch.allclose(made.weights(x_BTI, "v")[0, 0], torch.tensor([1 / 3, 0, 1 / 3, 1 / 3], dtype=torch.float64))
    with torch.no_grad():
        made.gates_["q"][1].normal_()
    assert torch.equal(made.weights(x_BTI, "q")[1, 3], torch.tensor([0, 1, 0, 0], dtype=torch.float64))


def test_while_it_learns_a_row_has_its_own_expert_at_the_sigmoid_of_its_gate(pool, x_BTI, trained):
    made = trained(pool)
    made.step = Step(torch.ones(2, 5), torch.tensor([2, 1]))
    w_BTE = made.weights(x_BTI, "q")
    v_EI = made.gates_["q"].detach()
    for b, e in ((0, 2), (1, 1)):
        expected_T = 1 / (1 + torch.exp(-x_BTI[b] @ v_EI[e]))
        assert torch.allclose(w_BTE[b, :, e], expected_T, atol=1e-12)
        assert w_BTE[b].count_nonzero() == 5
    # "e1" leaves "v" alone
    assert not made.weights(x_BTI, "v")[1].any()


def test_a_gate_begins_at_one_half_and_learns_from_its_own_rows_alone(pool, x_BTI):
    made = router("phatgoose", pool).double()
    made.step = Step(torch.ones(2, 5), torch.tensor([2, 0]))
    w_BTE = made.weights(x_BTI, "q")
    assert torch.equal(w_BTE[0, :, 2], torch.full((5,), 0.5, dtype=torch.float64))
    (w_BTE[0] ** 2).sum().backward()
    grad_EI = made.gates_["q"].grad
    assert grad_EI[2].any()
    assert not grad_EI[[0, 1, 3]].any()


def fitted(model, adapters, tokenizer, data, **settings):
    pool = ExpertPool(adapters)
    made = router("phatgoose", pool)
    engine = Composer(model, pool, tokenizer=tokenizer)
    return made.fit(engine, data, **{"steps": 6, "batch_size": 2, "warmup": 0, "progress": False, **settings})


def test_a_gate_is_the_same_whichever_others_learn_beside_it(make_model, make_adapters, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    adapters = make_adapters(model, "llama")
    together = fitted(model, adapters, tokenizer, DATA)
    for place, adapter in enumerate(adapters):
        alone = fitted(model, [adapter], tokenizer, {adapter.name: DATA[adapter.name]})
        for layer in alone.layers:
            assert torch.allclose(together.gates_[layer][place], alone.gates_[layer][0], atol=1e-4), (adapter.name, layer)
            assert alone.gates_[layer].abs().max() > 1e-3


def test_fitting_a_new_adapter_leaves_the_bits_of_the_others(make_model, make_adapters, tokenizer):
    model = make_model("llama")
    *old, new = make_adapters(model, "llama")
    made = fitted(model, old, tokenizer, {name: DATA[name] for name in ("a", "b")})
    more = made.add_expert(new.name, new)
    assert not any(more.gates_[layer][2].any() for layer in new.layers)
    larger = ExpertPool([*old, new])
    engine = Composer(model, larger, tokenizer=tokenizer)
    more.fit(engine, {"c": DATA["c"]}, steps=5, batch_size=2, warmup=0, progress=False)
    for layer in made.layers:
        assert torch.equal(more.gates_[layer][:2], made.gates_[layer])
    assert all(more.gates_[layer][2].any() for layer in new.layers)
