"""What every merge method keeps, whoever wrote it: one run per file of composer/methods."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraweave import registry
from loraweave.types import Factors

METHODS = registry.names("methods")
# methods that mix a and b apart, and say so in their docstring: they depend on how an update is split into factors
FACTOR_SPACE = {"factor_sum"}

Method = Callable[..., Factors | None]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return registry.get("methods", request.param)


def factors(seed: int, rank: int = 3, num_out: int = 5, num_in: int = 7) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator))


def dense(update: Factors | None) -> torch.Tensor:
    assert update is not None
    return update.b_OR.double() @ update.a_RI.double()


def test_there_are_methods() -> None:
    assert {"linear", "factor_sum"} <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=20, deadline=None)
@given(
    num_experts=st.integers(1, 4),
    rank=st.integers(1, 4),
    num_out=st.integers(1, 6),
    num_in=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_the_result_fits_the_layer_and_is_finite(
    name: str, num_experts: int, rank: int, num_out: int, num_in: int, seed: int
) -> None:
    experts = [factors(seed + n, rank, num_out, num_in) for n in range(num_experts)]
    found = registry.get("methods", name)(experts, [0.5 - n for n in range(num_experts)])
    assert found.b_OR.shape[0] == num_out
    assert found.a_RI.shape[1] == num_in
    assert found.a_RI.dtype == found.b_OR.dtype == torch.float32
    assert bool(torch.isfinite(dense(found)).all())


def test_the_experts_are_not_changed(method: Method) -> None:
    experts, weights = [factors(0), factors(1)], [0.7, -0.4]
    method(experts, weights)
    for seed, expert in enumerate(experts):
        assert torch.equal(expert.a_RI, factors(seed).a_RI)
        assert torch.equal(expert.b_OR, factors(seed).b_OR)
    assert weights == [0.7, -0.4]


def test_the_result_shares_no_memory_with_an_expert_that_could_change_it(method: Method) -> None:
    expert = factors(0)
    found = method([expert, factors(1)], [1.0, 1.0])
    before = dense(found)
    expert.a_RI.zero_()
    expert.b_OR.zero_()
    assert torch.equal(dense(found), before)


def test_it_is_deterministic(method: Method) -> None:
    experts = [factors(0), factors(1)]
    assert torch.equal(dense(method(experts, [0.7, -0.4])), dense(method(experts, [0.7, -0.4])))


def test_the_order_of_experts_does_not_matter(method: Method) -> None:
    experts, weights = [factors(seed) for seed in range(3)], [0.7, -0.4, 1.3]
    forth, back = method(experts, weights), method(experts[::-1], weights[::-1])
    assert torch.allclose(dense(forth), dense(back), rtol=1e-5, atol=1e-5)


def test_weights_of_zero_change_nothing(method: Method) -> None:
    found = method([factors(0), factors(1)], [0.0, 0.0])
    assert found is None or not dense(found).any()


def test_an_expert_of_weight_zero_does_not_count(method: Method) -> None:
    assert torch.allclose(
        dense(method([factors(0), factors(1)], [0.7, 0.0])), dense(method([factors(0)], [0.7])), rtol=1e-6, atol=1e-6
    )


def test_an_expert_without_the_layer_counts_as_zero(method: Method) -> None:
    assert method([None, None], [1.0, -1.0]) is None
    found = method([None, factors(1)], [0.5, 1.0])
    assert torch.allclose(dense(found), dense(method([factors(1)], [1.0])), rtol=1e-6, atol=1e-6)


def test_a_single_weight_of_one_gives_that_adapter(method: Method) -> None:
    for rank in (1, 3):
        experts = [factors(0, rank), factors(1, rank), factors(2, rank)]
        assert torch.allclose(dense(method(experts, [0.0, 1.0, 0.0])), dense(experts[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FACTOR_SPACE])
def test_only_the_updates_count_not_their_factors(name: str) -> None:
    method: Method = registry.get("methods", name)
    experts, weights = [factors(0), factors(1)], [0.7, -0.4]
    turned = []
    for seed, expert in enumerate(experts):
        turn_RR = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double() + 3 * torch.eye(3).double()
        a_RI, b_OR = turn_RR @ expert.a_RI.double(), expert.b_OR.double() @ torch.linalg.inv(turn_RR)
        turned.append(Factors(a_RI.float(), b_OR.float()))
    assert torch.allclose(dense(method(experts, weights)), dense(method(turned, weights)), rtol=1e-4, atol=1e-4)
