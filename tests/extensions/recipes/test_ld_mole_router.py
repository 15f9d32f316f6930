"""LD-MoLE's gates, the lambda that its tokens get, and the loss on their number of experts."""

from __future__ import annotations

import math

import pytest
import torch

from loraweave.errors import WeightingError
from loraweave.extensions.recipes.recipes.ld_mole import sparsegen
from loraweave.routers.tokens._learned import Step
from loraweave.routers.tokens._saved import router


@pytest.fixture
def pool(random_pool):
    every = {"k": (2, 20, 12), "q": (2, 20, 12), "v": (2, 7, 12)}
    return random_pool(every, {"q": (2, 20, 12), "v": (2, 7, 12)}, every, every)


@pytest.fixture
def x_BTI(x_BTI):
    return 3 * x_BTI


def made_of(pool, **options):
    torch.manual_seed(2)
    return router("ld_mole", pool, hidden=8, **options).double()


@pytest.mark.parametrize(("layer", "present"), [("q", [0, 1, 2, 3]), ("k", [0, 2, 3])])
def test_weights_are_sparsegen_of_the_gates_with_a_lambda_from_the_mlp(pool, x_BTI, layer, present):
    made = made_of(pool)
    mlp = made.lambdas_["20"]
    hidden = (x_BTI @ mlp.first.weight.T + mlp.first.bias).clamp_min(0)
    out = hidden @ mlp.last.weight.T + mlp.last.bias
    lambda_BT1 = 0.99 - torch.log(1 + torch.exp(-out))
    scores_BTP = (x_BTI @ made.gates_[layer].T)[..., present]
    w_BTE = made.weights(x_BTI, layer)
    assert torch.allclose(w_BTE[..., present], sparsegen(scores_BTP, lambda_BT1), atol=1e-12)
    assert w_BTE.detach()[..., [e for e in range(4) if e not in present]].count_nonzero() == 0
    assert bool((made.lambdas(x_BTI, layer) < 0.99).all())


def test_tokens_get_different_numbers_of_experts(pool, x_BTI):
    made = made_of(pool)
    with torch.no_grad():
        made.gates_["q"].mul_(5)
        counts = (made.weights(x_BTI, "q") > 0).sum(dim=-1)
    assert len(set(counts.flatten().tolist())) > 1


def test_layers_of_as_many_inputs_share_an_mlp_and_have_gates_of_their_own(pool):
    made = made_of(pool)
    assert set(made.lambdas_) == {"7", "20"}
    assert sorted(made.gates_) == ["k", "q", "v"]


def test_lambda_begins_where_several_experts_take_part_and_hidden_units_have_gradients(pool, x_BTI):
    made = made_of(pool)
    at_zero_BT1 = made.lambdas(torch.zeros_like(x_BTI), "q").detach()
    assert at_zero_BT1.flatten().tolist() == pytest.approx([0.99 - math.log(1 + math.exp(2.5))] * 10)
    made.lambdas(x_BTI, "q").sum().backward()
    assert bool(made.lambdas_["20"].first.weight.grad.any())


def test_gradients_are_those_of_finite_differences(pool, x_BTI, has_exact_gradients):
    names = ("gates_.q", "lambdas_.20.first.weight", "lambdas_.20.last.weight")
    assert has_exact_gradients(made_of(pool), "q", x_BTI[:1, :2], names)


def test_the_sparsity_loss_is_how_far_lambda_is_below_the_least_for_the_target(pool, x_BTI):
    made = made_of(pool, sparsity=0.3, target=2)
    mask_BT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    made.step = Step(mask_BT, torch.full((2,), -1))
    means = []
    for layer, present in (("q", [0, 1, 2, 3]), ("k", [0, 2, 3])):
        made.weights(x_BTI, layer)
        u_BTP = (x_BTI @ made.gates_[layer].T)[..., present].sort(dim=-1, descending=True).values
        least_BT = 1 - (u_BTP[..., 0] + u_BTP[..., 1] - 2 * u_BTP[..., 2])
        short_BT = (least_BT - made.lambdas(x_BTI, layer)[..., 0]).clamp_min(0)
        means.append(float(short_BT[mask_BT.bool()].detach().mean()))
    loss = made.losses(made.step)["sparsity"]
    assert float(loss.detach()) == pytest.approx(0.3 * sum(means) / 2)
    loss.backward()
    assert made.gates_["q"].grad is None
    assert bool(made.lambdas_["20"].last.bias.grad.any())
    assert made_of(pool).losses(made.step) == {}


def test_the_sparsity_loss_alone_brings_tokens_down_to_the_target(pool, x_BTI):
    made = made_of(pool, sparsity=1.0, target=2)
    optimizer = torch.optim.Adam(made.lambdas_.parameters(), lr=0.05)
    for _ in range(100):
        made.step = Step(torch.ones(2, 5), torch.full((2,), -1))
        made.weights(x_BTI, "q")
        optimizer.zero_grad()
        made.losses(made.step)["sparsity"].backward()
        optimizer.step()
    counts = (made.weights(x_BTI, "q") > 0).sum(dim=-1)
    assert int(counts.max()) <= 2


AT_LEAST_1 = "a whole number of at least 1"


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [("hidden", 0, AT_LEAST_1), ("target", 0, AT_LEAST_1), ("sparsity", -1, "a finite number of at least 0")],
)
def test_a_value_outside_its_kind_is_refused(pool, option, value, kind):
    with pytest.raises(WeightingError, match=f"router 'ld_mole' got {option}={value!r}; it takes {kind}$"):
        router("ld_mole", pool, **{option: value})
