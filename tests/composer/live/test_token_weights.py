"""Weights that are made in a call: they fit it or are named, come with the experts' own product, or choose few experts."""

import pytest
import torch
from tiny_models import random_adapter
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.errors import ScopeError, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.routers.tokens._saved import router
from loraweave.types import Factors


class Constant:
    """A router of ones."""

    def __init__(self, *shape, dtype=torch.float32):
        self.w_BTE = torch.ones(shape, dtype=dtype)

    def weights(self, x_BTI, layer):
        return self.w_BTE


@pytest.fixture
def engine():
    torch.manual_seed(0)
    return Composer(
        nn.Sequential(nn.Linear(4, 3)), [Adapter("a", "tiny", {"0": Factors(torch.ones(1, 4), torch.ones(3, 1))})]
    )


@pytest.mark.parametrize(
    ("shape", "named"), [((0, 1, 1), "0 rows"), ((3, 1, 1), "3 rows"), ((1, 0, 1), "0 tokens")], ids=str
)
def test_weights_of_other_rows_or_tokens_are_named(shape, named, engine):
    with engine.activate(Constant(*shape)), pytest.raises(ScopeError, match=f"have {named}, but the input of layer '0'"):
        engine.model(torch.ones(2, 5, 4))


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4)], ids=["rows", "tokens"])
def test_a_batch_without_rows_or_tokens_is_mixed_by_a_router_of_many_experts(shape):
    adapters = [Adapter(name, "tiny", {"0": Factors(torch.ones(9, 4), torch.ones(3, 9))}) for name in "abcdef"]
    engine = Composer(nn.Sequential(nn.Linear(4, 3)).bfloat16(), adapters)
    with engine.activate(Constant(*shape[:2], 6)), torch.no_grad():
        assert engine.model(torch.ones(shape).bfloat16()).shape == (*shape[:2], 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool], ids=str)
def test_weights_of_any_dtype_count_as_numbers(dtype, engine):
    x_BTI = torch.randn(2, 5, 4)
    with engine.activate(Constant(1, 1, 1, dtype=dtype)):
        found = engine.model(x_BTI)
    assert found.dtype == torch.float32
    assert torch.allclose(found, engine.model(x_BTI) + x_BTI.sum(dim=-1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_told_with_its_layer_and_expert(value):
    adapters = [Adapter(name, "tiny", {"0": Factors(torch.ones(1, 4), torch.ones(3, 1))}) for name in "abc"]
    engine, router = Composer(nn.Sequential(nn.Linear(4, 3)), adapters), Constant(2, 5, 3)
    router.w_BTE[1, 3, 1] = value
    with engine.activate(router), pytest.raises(WeightingError, match=r"layer '0' .* first for expert 'b'"):
        engine.model(torch.ones(2, 5, 4))


def test_a_model_that_changes_its_precision_has_the_formula_in_the_new_one(engine):
    x_BTI = torch.randn(2, 5, 4)
    with torch.no_grad(), engine.activate(Constant(1, 1, 1)):
        for dtype in (torch.float32, torch.float64, torch.float32):
            model, x = engine.model.to(dtype), x_BTI.to(dtype)
            expected = nn.functional.linear(x, model[0].weight + 1, model[0].bias)
            # ten products and sums, of numbers below 10
            torch.testing.assert_close(model(x), expected, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_a_router_answers_in_its_own_precision_below_autocast():
    adapters = [random_adapter(name, {"0": (3, 64, 32)}, seed) for seed, name in enumerate("abc")]
    engine = Composer(nn.Sequential(nn.Linear(64, 32)), adapters)
    made = router("arrow", adapters)
    x_BTI = torch.randn(2, 5, 64)
    with torch.no_grad(), engine.activate(made), torch.autocast("cpu", torch.bfloat16):
        engine.model(x_BTI)
    assert torch.equal(engine.last_weights["0"], made.weights(x_BTI, "0"))


NUM_INPUTS, NUM_OUTPUTS = 63, 37


class Squared:
    """A router that is none of loraweave's: two directions for three experts."""

    def __init__(self, *, learned=False):
        self.v_PI = torch.randn(2, NUM_INPUTS, generator=torch.Generator().manual_seed(5)).requires_grad_(learned)
        self.calls = []

    def directions(self, layer):
        return self.v_PI

    def weights_along(self, z_BTP, x_BTI, layer):
        self.calls.append("along")
        return self._of(z_BTP)

    def weights(self, x_BTI, layer):
        self.calls.append("alone")
        return self._of(x_BTI.to(self.v_PI.dtype) @ self.v_PI.T)

    def _of(self, z_BTP):
        return torch.cat([z_BTP.square(), z_BTP.sum(dim=-1, keepdim=True)], dim=-1)


@pytest.fixture
def three(make_adapter):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(NUM_INPUTS, NUM_OUTPUTS)).requires_grad_(False)
    return Composer(
        model, [make_adapter(model, name, rank=rank, targets=("0",)) for rank, name in enumerate("abc", start=1)]
    )


def expected(engine, router, x_BTI):
    w_BTE = router._of(x_BTI @ router.v_PI.T)
    total = engine.model(x_BTI)
    for place, adapter in enumerate(engine.pool.adapters.values()):
        factors = adapter.layers["0"]
        total = total + w_BTE[..., place, None] * (x_BTI @ factors.a_RI.T @ factors.b_OR.T)
    return total


@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (3, 63)], ids=str)
def test_one_product_gives_scores_and_hidden_values(shape, three):
    router, x_BTI = Squared(), torch.randn(*shape, NUM_INPUTS)
    with torch.no_grad():
        formula = expected(three, router, x_BTI)
        with three.activate(router):
            found = three.model(x_BTI)
    assert router.calls == ["along"]
    assert torch.allclose(found, formula, rtol=1e-4, atol=1e-4 * float(formula.abs().max()))


def test_directions_that_change_count_from_then_on(three):
    router, x_BTI = Squared(), torch.randn(2, 5, NUM_INPUTS)
    with torch.no_grad(), three.activate(router):
        for _ in range(2):
            found = three.model(x_BTI)
            with three.activate({}):
                formula = expected(three, router, x_BTI)
            assert torch.allclose(found, formula, rtol=1e-4, atol=1e-4 * float(formula.abs().max()))
            router.v_PI.mul_(0.5)


def test_gradients_go_through_the_router_itself(three):
    router = Squared(learned=True)
    x_BTI, c_BTO = torch.randn(2, 5, NUM_INPUTS, requires_grad=True), torch.randn(2, 5, NUM_OUTPUTS)
    grads = []
    for ours in (True, False):
        if ours:
            with three.activate(router):
                found = three.model(x_BTI)
        else:
            found = expected(three, router, x_BTI)
        grads.append(torch.autograd.grad((found * c_BTO).sum(), [x_BTI, router.v_PI]))
    assert router.calls == ["alone"]
    for mine, theirs in zip(*grads, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_half_precision_leaves_the_scores_to_the_router(three):
    router = Squared()
    three.model.bfloat16()
    x_BTI = torch.randn(2, 5, NUM_INPUTS).bfloat16()
    with torch.no_grad(), three.activate(router):
        three.model(x_BTI)
        used = three.last_weights["0"]
    assert router.calls == ["alone"]
    assert torch.equal(used, router._of(x_BTI.float() @ router.v_PI.T))


def test_the_directions_are_counted_as_memory(three):
    router = Squared()
    with torch.no_grad(), three.activate(router) as activation:
        three.model(torch.randn(1, 2, NUM_INPUTS))
        assert activation.plan.num_bytes == 4 * (6 * (NUM_INPUTS + NUM_OUTPUTS) + 2 * NUM_INPUTS)
