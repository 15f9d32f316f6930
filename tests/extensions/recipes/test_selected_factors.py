"""Pools of factors of rank 1, of which each row gets its own, against the formula written out."""

import pytest
import torch
from torch.nn import functional

import loraweave as lw

LAYER = "model.layers.1.mlp.up_proj"
KEY = LAYER.replace(".", "/")
ROWS = {
    "input_ids": torch.tensor([[3, 9, 27, 20, 60], [0, 0, 3, 15, 44]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
}


@pytest.fixture
def make_trained(make_model):
    def make(**options):
        settings = {"num_experts": 5, "rank": 2, "alpha": 6.0, "target_modules": (LAYER,), **options}
        made = lw.experts("mixlora_conditional", make_model("llama", dtype=torch.float64), **settings)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in made.expert_parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        return made

    return make


def seen_by(made):
    """x and y of the layer in a call."""
    seen = {}
    made.base_model.get_submodule(LAYER).register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    made(**ROWS)
    return seen["x"], seen["y"]


def expected(made, x_TI, mean_I, *, a_weight):
    """One row, factor by factor."""
    factors, r_EI = made.layers[KEY], made.gates[KEY].r_EI
    r_a_EI, r_b_EI = r_EI.chunk(2)
    best_a = (r_a_EI @ mean_I).topk(2).indices.tolist()
    of_b_E = functional.softmax(r_b_EI @ mean_I, dim=0)
    if a_weight is not None:
        along_E = sum(
            functional.softmax(k_EI @ factors.a_EI[e], dim=0) for k_EI, e in zip(factors.k_REI, best_a, strict=True)
        )
        of_b_E = of_b_E + a_weight * functional.softmax(along_E, dim=0)
    best_b = of_b_E.topk(2).indices.tolist()
    y_TO = x_TI @ made.base_model.get_submodule(LAYER).weight.T
    for e, f in zip(best_a, best_b, strict=True):
        y_TO = y_TO + 6.0 / 2 * (x_TI @ factors.a_EI[e])[:, None] * factors.b_EO[f]
    return y_TO


@pytest.mark.parametrize("options", [{"conditional": False}, {"a_weight": 0.0}, {"a_weight": 1.0}, {"a_weight": 40.0}])
def test_a_row_has_the_best_of_each_pool_paired_in_order(make_trained, options):
    made = make_trained(**options)
    x_BTI, y_BTO = seen_by(made)
    for row, start in enumerate((0, 2)):
        own = expected(made, x_BTI[row], x_BTI[row, start:].mean(dim=0), a_weight=options.get("a_weight"))
        torch.testing.assert_close(y_BTO[row], own)


def test_what_is_chosen_of_a_can_change_what_is_chosen_of_b(make_trained):
    outputs = [seen_by(make_trained(a_weight=a_weight))[1] for a_weight in (0.0, 40.0)]
    assert not torch.allclose(*outputs)


def test_as_released_the_padding_counts_in_the_mean(make_trained):
    made = make_trained(as_released=True)
    x_BTI, y_BTO = seen_by(made)
    for row in range(2):
        torch.testing.assert_close(y_BTO[row], expected(made, x_BTI[row], x_BTI[row].mean(dim=0), a_weight=1.0))


def test_all_of_equal_pools_are_one_lora_of_that_rank(make_trained):
    made = make_trained(rank=5)
    factors = made.layers[KEY]
    with torch.no_grad():
        # whatever a factor a is paired with
        factors.b_EO.copy_(factors.b_EO[:1].expand(5, -1).clone())
    x_BTI, y_BTO = seen_by(made)
    weight_OI = made.base_model.get_submodule(LAYER).weight + 6.0 / 5 * factors.b_EO.T @ factors.a_EI
    torch.testing.assert_close(y_BTO, x_BTI @ weight_OI.T)


def test_the_order_of_the_pools_does_not_matter(make_trained):
    made = make_trained()
    before, factors, gate = made(**ROWS).logits, made.layers[KEY], made.gates[KEY]
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for parameter in (factors.a_EI, factors.b_EO):
            parameter.copy_(parameter[order].clone())
        factors.k_REI.copy_(factors.k_REI[:, order].clone())
        gate.r_EI.copy_(gate.r_EI[torch.cat([order, 5 + order])].clone())
    torch.testing.assert_close(made(**ROWS).logits, before)


def test_selectors_learn_as_if_factors_were_times_their_scores(make_trained):
    made = make_trained(conditional=False)
    factors, gate = made.layers[KEY], made.gates[KEY]
    seen = {}
    made.base_model.get_submodule(LAYER).register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    made(**ROWS)
    own = torch.autograd.grad(seen["y"].square().sum(), gate.r_EI)[0]
    means_BI = torch.stack([seen["x"][0].mean(dim=0), seen["x"][1, 2:].mean(dim=0)]).detach()
    by_hand = torch.zeros_like(own)
    for row, mean_I in enumerate(means_BI):
        r_EI = gate.r_EI.detach().requires_grad_()
        p_a_E, p_b_E = (functional.softmax(part @ mean_I, dim=0) for part in r_EI.chunk(2))
        update_TO = 0
        for e, f in zip(p_a_E.topk(2).indices.tolist(), p_b_E.topk(2).indices.tolist(), strict=True):
            # near the chosen factors as they are
            times = (1 + p_a_E[e] - p_a_E[e].detach()) * (1 + p_b_E[f] - p_b_E[f].detach())
            update_TO = update_TO + 3.0 * times * (seen["x"][row].detach() @ factors.a_EI[e])[:, None] * factors.b_EO[f]
        loss = (update_TO * 2 * seen["y"][row].detach()).sum()
        by_hand += torch.autograd.grad(loss, r_EI)[0]
    torch.testing.assert_close(own, by_hand)
    assert own.any()


def test_as_released_the_selectors_have_no_gradient(make_trained):
    made = make_trained(as_released=True)
    made(**ROWS).logits.square().sum().backward()
    for selector in (made.gates[KEY].r_EI, made.layers[KEY].k_REI):
        assert selector.grad is None
        assert not selector.requires_grad
    assert made.layers[KEY].a_EI.grad.any()


def test_factors_are_chosen_in_fp32_below_autocast(make_model):
    made = lw.experts(
        "mixlora_conditional", make_model("llama"), num_experts=5, rank=1, target_modules=(LAYER,), a_weight=9.0
    )
    factors, x_BTI = made.layers[KEY], torch.ones(1, 1, 16)
    with torch.no_grad():
        factors.a_EI.fill_(1 / 16)
        # bf16 cannot tell the best from the others
        factors.k_REI.fill_(256.0)
        factors.k_REI[0, 3] += 0.25
        factors.b_EO.copy_(torch.arange(5.0)[:, None].expand(-1, 24))
        y_BTO = torch.zeros(1, 1, 24)
        with torch.autocast("cpu", torch.bfloat16):
            found = factors(made.base_model.get_submodule(LAYER), (x_BTI,), y_BTO, lambda x: torch.zeros(1, 1, 10))
    assert torch.equal(found, torch.full((1, 1, 24), 3.0 * factors.recipe.scale))
