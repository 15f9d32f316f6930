"""Hard routing, against the argmax and the gradient of the softmax written out."""

from __future__ import annotations

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._saved import router


@pytest.fixture
def pool(random_pool):
    every = {"k": (2, 20, 12), "q": (2, 20, 12), "v": (2, 7, 12)}
    return random_pool(every, {"q": (2, 20, 12), "v": (2, 7, 12)}, every)


def made_of(pool, **options):
    torch.manual_seed(2)
    return router("hard_routed", pool, **options).double()


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(("layer", "present"), [("q", [0, 1, 2]), ("k", [0, 2])])
def test_the_best_expert_of_a_token_has_a_weight_of_exactly_1(pool, x_BTI, layer, present, learns):
    made = made_of(pool)
    with torch.set_grad_enabled(learns):
        w_BTE = made.weights(x_BTI, layer)
    assert w_BTE.requires_grad == learns
    scores_BTE = x_BTI @ made.gates_[made.gate_of(layer)].detach().T
    for b in range(2):
        for t in range(5):
            best = max(present, key=scores_BTE[b, t].tolist().__getitem__)
            assert w_BTE[b, t].tolist() == [float(e == best) for e in range(3)]
    assert len(set(w_BTE.argmax(dim=-1).flatten().tolist())) > 1


def test_the_gradient_is_that_of_the_softmax(pool, x_BTI):
    made = made_of(pool)
    up_BTE = torch.randn(2, 5, 3, dtype=torch.float64)
    (made.weights(x_BTI, "q") * up_BTE).sum().backward()
    g_EI = made.gates_[made.gate_of("q")].detach().clone().requires_grad_()
    e_BTE = (x_BTI @ g_EI.T).exp()
    (e_BTE / e_BTE.sum(dim=-1, keepdim=True) * up_BTE).sum().backward()
    assert torch.allclose(made.gates_[made.gate_of("q")].grad, g_EI.grad, atol=1e-12)


def test_layers_of_as_many_inputs_share_a_matrix_unless_each_is_to_have_its_own(pool):
    assert {name: tuple(each.shape) for name, each in made_of(pool).gates_.named_parameters()} == {"k": (3, 20), "v": (3, 7)}
    assert sorted(made_of(pool, shared=False).gates_) == ["k", "q", "v"]
    assert made_of(pool, shared=False).options == {"shared": False}


def test_where_one_expert_is_chosen_everywhere_the_model_is_that_adapters(make_model, make_adapters):
    model = make_model("llama")
    pool = ExpertPool(make_adapters(model, "llama")).subset(["c"])
    ids_BT = torch.tensor([[5, 9, 11, 2, 30]])
    with torch.no_grad():
        with Composer(model, pool).activate({"c": 1.0}):
            expected = model(ids_BT).logits
        with Composer(model, pool).activate(router("hard_routed", pool)):
            assert torch.allclose(model(ids_BT).logits, expected, atol=1e-5)
