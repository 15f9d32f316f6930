"""What every merge method keeps, whoever wrote it: one case for each, an extension's too."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import Properties

from loraweave import registry
from loraweave.composer.merge.method_call import DenseUpdate, MethodCall, TruncatedUpdate
from loraweave.composer.merge.methods import _entries
from loraweave.errors import AdapterUnsupported, LayerMismatch, WeightingError
from loraweave.types import Factors

METHODS = registry.names("methods")
TRAITS = {name: registry.traits_of(registry.get("methods", name)) for name in METHODS}
PROPERTIES = Properties(METHODS)

Update = Factors | DenseUpdate | TruncatedUpdate


def factors(seed: int, rank: int = 3, num_out: int = 5, num_in: int = 7) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, num_in, generator=generator), torch.randn(num_out, rank, generator=generator))


def recorded(seed: int, num_out: int, num_in: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(1000 + seed)
    x_NI = torch.randn(3 * num_in, num_in, generator=generator)
    fisher_OI = torch.rand(num_out, num_in, generator=generator) + 0.1
    gram_II, num_tokens = x_NI.T @ x_NI / len(x_NI), len(x_NI)
    return SimpleNamespace(gram_II=gram_II, fisher_OI=fisher_OI, num_tokens=num_tokens, fisher_norm=None, turned=False)


class Method:
    """A registered method as `merge` calls it, with the seeds and statistics that it asks for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self,
        experts: Sequence[Factors | None],
        weights: Sequence[float],
        places: Sequence[int] | None = None,
        **options: object,
    ) -> Update | None:
        """`places` names the experts, for seeds and statistics that follow them; their order by default."""
        own = list(range(len(experts)) if places is None else places)
        seen = [
            None if f is None else recorded(place, f.b_OR.shape[0], f.a_RI.shape[1])
            for place, f in zip(own, experts, strict=True)
        ]
        named = {str(number): expert for number, expert in enumerate(experts)}
        seeds = [11 + place for place in own]
        return MethodCall(self.name, options).combine("layer", named, weights, seeds=seeds, statistics=seen)

    def experts(self, *wanted: Factors) -> list[Factors]:
        """The experts as this method needs them: one A for all where its formula has one."""
        return (
            [replace(each, a_RI=wanted[0].a_RI.clone()) for each in wanted] if "one_a" in TRAITS[self.name] else list(wanted)
        )

    def weights(self, *wanted: float) -> list[float]:
        return [abs(weight) for weight in wanted] if "shares" in TRAITS[self.name] else list(wanted)


@PROPERTIES.given
def method(name: str) -> Method:
    return Method(name)


def tensors(update: Update | None) -> list[torch.Tensor]:
    assert update is not None
    held = update.factors if isinstance(update, TruncatedUpdate) else update
    return [held.delta_OI] if isinstance(held, DenseUpdate) else [held.b_OR, held.a_RI]


def dense(update: Update | None) -> torch.Tensor:
    parts = [tensor.double() for tensor in tensors(update)]
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps_all_properties(name: str, request: pytest.FixtureRequest) -> None:
    PROPERTIES.walk(request, name)


def test_there_are_methods() -> None:
    assert {"linear", "factor_sum", "ties", "svd"} <= set(METHODS)


@PROPERTIES.add()
@settings(max_examples=12, deadline=None)
@given(
    num_experts=st.integers(1, 4),
    rank=st.integers(1, 4),
    num_out=st.integers(1, 6),
    num_in=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def the_result_fits_the_layer_and_is_finite(
    name: str, num_experts: int, rank: int, num_out: int, num_in: int, seed: int
) -> None:
    method = Method(name)
    if "pairs" in TRAITS[name]:
        num_experts = 2
    experts = method.experts(*[factors(seed + n, rank, num_out, num_in) for n in range(num_experts)])
    found = method(experts, method.weights(*[0.5 - n for n in range(num_experts)]))
    if found is None:
        return
    assert dense(found).shape == (num_out, num_in)
    assert all(tensor.dtype == torch.float32 for tensor in tensors(found))
    assert bool(torch.isfinite(dense(found)).all())


HARD: dict[str, Callable[[], list[Factors]]] = {
    "identical": lambda: [factors(0), factors(0)],
    "opposite": lambda: [factors(0), replace(factors(0), b_OR=-factors(0).b_OR)],
    "zero": lambda: [Factors(torch.zeros(2, 7), torch.zeros(5, 2)) for _ in range(2)],
    "one zero": lambda: [factors(0), Factors(torch.zeros(3, 7), torch.zeros(5, 3))],
    "equal magnitudes": lambda: [Factors(torch.ones(1, 7), torch.ones(5, 1)) for _ in range(2)],
}


@PROPERTIES.add(hard=list(HARD))
def hard_experts_give_no_nan(method: Method, hard: str) -> None:
    found = method(method.experts(*HARD[hard]()), [1.0, 1.0])
    assert found is None or bool(torch.isfinite(dense(found)).all())


@PROPERTIES.add(rank=[2, 0])
def updates_of_zero_give_zero(method: Method, rank: int) -> None:
    zero = Factors(torch.zeros(rank, 7), torch.zeros(5, rank))
    found = method([zero, zero], [1.0, 1.0])
    assert found is None or not dense(found).any()


@PROPERTIES.add()
def the_experts_are_not_changed(method: Method) -> None:
    experts, weights = method.experts(factors(0), factors(1)), method.weights(0.7, -0.4)
    before, given_weights = [tensor.clone() for each in experts for tensor in (each.a_RI, each.b_OR)], list(weights)
    method(experts, weights)
    assert all(map(torch.equal, before, [tensor for each in experts for tensor in (each.a_RI, each.b_OR)]))
    assert weights == given_weights


@PROPERTIES.add()
def the_result_shares_no_memory_with_an_expert_that_could_change_it(method: Method) -> None:
    experts = method.experts(factors(0), factors(1))
    found = method(experts, [1.0, 1.0])
    before = dense(found)
    for expert in experts:
        expert.a_RI.zero_()
        expert.b_OR.zero_()
    assert torch.equal(dense(found), before)


@PROPERTIES.add()
def it_is_deterministic(method: Method) -> None:
    experts, weights = method.experts(factors(0), factors(1)), method.weights(0.7, -0.4)
    assert torch.equal(dense(method(experts, weights)), dense(method(experts, weights)))


@PROPERTIES.add()
def the_order_of_experts_does_not_matter(method: Method) -> None:
    seeds, values = ([0, 1], [0.7, -0.4]) if "pairs" in TRAITS[method.name] else ([0, 1, 2], [0.7, -0.4, 1.3])
    experts, weights = method.experts(*map(factors, seeds)), method.weights(*values)
    forth, back = method(experts, weights, seeds), method(experts[::-1], weights[::-1], seeds[::-1])
    assert torch.allclose(dense(forth), dense(back), rtol=1e-5, atol=1e-5)


@PROPERTIES.add()
def weights_of_zero_change_nothing(method: Method) -> None:
    found = method(method.experts(factors(0), factors(1)), [0.0, 0.0])
    assert found is None or not dense(found).any()


@PROPERTIES.add()
def an_expert_of_weight_zero_does_not_count(method: Method) -> None:
    experts = method.experts(factors(0), factors(1), factors(2))
    if "pairs" in TRAITS[method.name]:
        some, all_but_one = method(experts, [0.7, 0.0, 0.3]), method([experts[0], experts[2]], [0.7, 0.3])
    else:
        some, all_but_one = method(experts, [0.7, 0.0, 0.3]), method([experts[0], experts[2]], [0.7, 0.3], [0, 2])
    assert torch.allclose(dense(some), dense(all_but_one), rtol=1e-6, atol=1e-6)


@PROPERTIES.add()
def no_expert_with_the_layer_leaves_it_alone(method: Method) -> None:
    assert method([None, None], [1.0, 1.0]) is None


@PROPERTIES.add()
def an_expert_without_the_layer_counts_as_zero(method: Method) -> None:
    if TRAITS[method.name] & {"pairs", "shares"}:
        pytest.skip("an absent layer is a zero update of its own share here, which its own tests check")
    found = method([None, factors(1)], [0.5, 1.0])
    assert torch.allclose(dense(found), dense(method([factors(1)], [1.0], [1])), rtol=1e-6, atol=1e-6)


@PROPERTIES.add()
def a_single_weight_of_one_gives_that_adapter(method: Method) -> None:
    if "lossy" in TRAITS[method.name]:
        pytest.skip("its formula changes a single adapter too")
    for rank in (1, 3):
        experts = method.experts(factors(0, rank), factors(1, rank), factors(2, rank))
        found = method(experts, [0.0, 1.0, 0.0])
        assert torch.allclose(dense(found), dense(experts[1]), rtol=1e-4, atol=1e-5)


@PROPERTIES.add(of=[name for name in METHODS if "one_a" not in TRAITS[name]])
def only_the_updates_count_unless_the_method_mixes_factors(name: str) -> None:
    method, by_factors = Method(name), "by_factors" in TRAITS[name]
    pair, three = ([(0, 3), (1, 3)], [0.7, -0.4]), ([(0, 2), (1, 1), (2, 3)], [1.0, 0.5, -2.0])
    sizes, values = pair if by_factors or "pairs" in TRAITS[name] else three
    experts, weights = [factors(seed, rank, 9, 11) for seed, rank in sizes], method.weights(*values)
    turned = []
    for seed, expert in enumerate(experts):
        eye_RR = torch.eye(expert.rank).double()
        turn_RR = torch.randn(eye_RR.shape, generator=torch.Generator().manual_seed(seed)).double() + 3 * eye_RR
        a_RI, b_OR = turn_RR @ expert.a_RI.double(), expert.b_OR.double() @ torch.linalg.inv(turn_RR)
        turned.append(Factors(a_RI.float(), b_OR.float()))
    found, other = dense(method(experts, weights)), dense(method(turned, weights))
    assert torch.allclose(found, other, rtol=1e-4, atol=1e-4) != by_factors
    assert not by_factors or float((found - other).norm()) > 0.1


@PROPERTIES.add()
def the_kind_of_layer_stays(method: Method) -> None:
    experts = [replace(each, kind="conv", kernel=(1, 1)) for each in method.experts(factors(0), factors(1))]
    found = method(experts, [0.5, 0.5])
    held = found.factors if isinstance(found, TruncatedUpdate) else found
    assert (held.kind, held.kernel) == ("conv", (1, 1))


@PROPERTIES.add()
def blocks_and_threads_do_not_show(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = method.experts(factors(0, 3, 37, 11), factors(1, 3, 37, 11))
    before = dense(method(experts, method.weights(0.7, -0.4)))
    monkeypatch.setattr(_entries, "BLOCK", 50)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        after = dense(method(experts, method.weights(0.7, -0.4)))
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(after, before, rtol=1e-6, atol=1e-6)


@PROPERTIES.add()
def the_global_generators_are_not_touched(method: Method) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    method(method.experts(factors(0), factors(1)), [1.0, 1.0])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


@PROPERTIES.add()
def updates_of_different_shape_are_refused(method: Method) -> None:
    for other in (factors(1, 3, 5, 6), replace(factors(1), kind="conv", kernel=(1, 1))):
        with pytest.raises(LayerMismatch):
            method([factors(0), other], [1.0, 1.0])


@PROPERTIES.add(named=[("magnitude_O", "DoRA"), ("base_bias_O", "base bias")])
def updates_that_need_the_base_layer_are_refused(method: Method, named: tuple[str, str]) -> None:
    part, word = named
    plain, unbound = method.experts(factors(0), factors(1))
    with pytest.raises(AdapterUnsupported, match=rf"method '{method.name}', layer .*{word}"):
        method([plain, replace(unbound, **{part: torch.ones(5)})], [1.0, 0.5])


@PROPERTIES.add()
def a_gain_is_merged_or_refused_and_never_lost(method: Method) -> None:
    plain, gaining = method.experts(factors(0), factors(1))
    try:
        found = method([plain, replace(gaining, gain_O=torch.ones(5))], [1.0, 0.5])
    except AdapterUnsupported:
        return
    held = found.factors if isinstance(found, TruncatedUpdate) else found
    assert held.gain_O.any()


@PROPERTIES.add(of=[name for name in METHODS if "shares" in TRAITS[name]])
def shares_are_not_negative(name: str) -> None:
    method = Method(name)
    with pytest.raises(WeightingError, match=r"shares|sum to 0"):
        method(method.experts(factors(0), factors(1)), [1.0, -1.0])


@PROPERTIES.add(of=[name for name in METHODS if "pairs" in TRAITS[name]])
def a_method_for_pairs_refuses_three(name: str) -> None:
    with pytest.raises(WeightingError, match="got 3: merge two at a time"):
        Method(name)([factors(0), factors(1), None], [1.0, 1.0, 1.0])


@PROPERTIES.add()
def the_defaults_of_the_options_are_in_their_ranges(name: str) -> None:
    parameters = inspect.signature(registry.get("methods", name)).parameters
    MethodCall(name, {option: parameters[option].default for option in MethodCall(name).own_options})


NAN, INF = float("nan"), float("inf")
# the option, values outside its range, and the methods that have it so; those of an extension only where it is there
OUTSIDE: list[tuple[str, list[object], str]] = [
    (
        "density",
        [-0.1, 1.1, NAN, None],
        "breadcrumbs dare_linear dare_ties della factor_dare_linear factor_dare_ties factor_magnitude_prune factor_ties "
        "magnitude_prune sce ties ties_count ties_per_layer ties_weighted",
    ),
    ("density", [0.0, 1.5], "robust_merge"),
    (
        "scale",
        [NAN, INF, None],
        "breadcrumbs core_space dare_linear dare_ties della iso_c iso_cts knots magnitude_prune robust_merge sce "
        "task_arithmetic ties ties_count ties_per_layer ties_weighted tsv",
    ),
    ("majority", ["max"], "dare_ties factor_dare_ties factor_ties ties_per_layer ties_weighted"),
    ("aggregate", ["max"], "della ties ties_count"),
    ("gamma", [-0.1, 1.1], "breadcrumbs"),
    ("epsilon", [-0.1, 1.1], "della"),
    ("collinear", [0.0, 1.5, NAN], "slerp"),
    ("common_space_fraction", [1.1, NAN], "iso_cts"),
    ("off_diagonal", [-0.1, 1.1, NAN], "regmean"),
    ("floor", [-1e-9, NAN, INF], "fisher"),
    ("tolerance", [-1.0, NAN], "karcher"),
    ("max_steps", [0], "karcher"),
    ("k", [0, 1.5], "tsv"),
    ("num_clusters", [0, 2.0], "lego"),
    ("random_state", [-1, 2**32], "lego"),
    ("angles", ["cosine"], "model_stock"),
    ("minimiser", ["adam"], "wudi"),
    ("basis", ["both"], "core_space"),
]


def options_outside_their_range_are_refused(name: str, option: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(WeightingError, match=f"method '{name}' got {option}="):
            MethodCall(name, {option: value})


for option, values, names in OUTSIDE:
    having = [name for name in names.split() if name in METHODS]
    PROPERTIES.add(of=having, option=[option], values=[values])(options_outside_their_range_are_refused)
