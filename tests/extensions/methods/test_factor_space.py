"""The methods on factors against PEFT, its helper functions on the factors, and the sums written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from tiny_models import Make, dense
from tiny_models import random_factors as factors
from torch import Tensor

from loraweave import registry
from loraweave.composer.merge.method_call import MethodCall
from loraweave.errors import LayerMismatch, WeightingError
from loraweave.extensions.methods.methods.factor_average import factor_average
from loraweave.extensions.methods.methods.factor_dare_linear import factor_dare_linear
from loraweave.extensions.methods.methods.factor_dare_ties import factor_dare_ties
from loraweave.extensions.methods.methods.factor_linear import factor_linear
from loraweave.extensions.methods.methods.factor_magnitude_prune import factor_magnitude_prune
from loraweave.extensions.methods.methods.factor_ties import factor_ties
from loraweave.types import Factors


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(
    ("method", "peft_type", "options"),
    [
        (factor_linear, "linear", {}),
        (factor_ties, "ties", {"density": 0.4}),
        (factor_ties, "ties", {"density": 0.7, "majority": "frequency"}),
        (factor_magnitude_prune, "magnitude_prune", {"density": 0.4}),
        (factor_dare_linear, "linear", {"density": 1.0, "seeds": [1, 2, 3]}),
    ],
)
def test_it_gives_the_same_delta_as_peft(
    method, peft_type: str, options: dict, scale: float, kind: str, in_peft: Make
) -> None:
    weights = [0.7, -0.4, 1.3]
    model, experts = in_peft([scale] * 3, [4, 4, 4], kind)
    peft_options = {"density": options.get("density", 1.0)} if peft_type != "linear" else {}
    if peft_type == "ties":
        peft_options["majority_sign_method"] = options.get("majority", "total")
    model.add_weighted_adapter(["0", "1", "2"], weights, "merged", combination_type=peft_type, **peft_options)
    stored_OI = model.base_model.model.layer.get_delta_weight("merged").detach().double()
    expected_OI = stored_OI.T if kind == "embedding" else stored_OI
    found = method(experts, weights, **options)
    assert found.rank == 4
    assert torch.allclose(dense(found), expected_OI, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_each_factor_is_what_pefts_helpers_make_of_it(density: float, majority: str) -> None:
    from peft.utils.merge_utils import ties

    experts, weights = [factors(seed, 3, 8, 11) for seed in range(4)], [1.0, 0.5, -2.0, 0.3]
    roots = torch.tensor(weights).abs().sqrt()
    found = factor_ties(experts, weights, density=density, majority=majority)
    expected_a = ties([f.a_RI for f in experts], roots * torch.tensor(weights).sign(), density, majority)
    assert torch.allclose(found.a_RI, expected_a, rtol=1e-5, atol=1e-6)
    assert torch.allclose(found.b_OR, ties([f.b_OR for f in experts], roots, density, majority), rtol=1e-5, atol=1e-6)


def test_with_different_scales_only_the_cross_terms_follow_the_folded_scale() -> None:
    # D_1 and D_2 are the same updates with the scale on b; PEFT would have sqrt(s_1 s_2) in both cross terms
    first, second = factors(0, 2), factors(1, 2)
    found = factor_linear([first, Factors(second.a_RI, 4.0 * second.b_OR)], [1.0, 1.0])
    a1, b1, a2, b2 = (t.double() for t in (first.a_RI, first.b_OR, second.a_RI, second.b_OR))
    assert torch.allclose(dense(found), b1 @ a1 + 4 * b2 @ a2 + b1 @ a2 + 4 * b2 @ a1, rtol=1e-5, atol=1e-5)


def test_a_single_weight_counts_once_and_with_its_sign() -> None:
    expert = factors(0, 3, bias_O=torch.ones(5))
    for weight in (1.0, 0.3, -2.0):
        found = factor_linear([expert], [weight])
        assert torch.allclose(dense(found), weight * dense(expert), rtol=1e-5, atol=1e-6)
        assert found.bias_O.tolist() == pytest.approx([weight] * 5)


def test_the_average_is_that_of_each_factor() -> None:
    experts = [factors(seed, 3) for seed in range(3)]
    found = factor_average(experts, [1.0, 2.0, 5.0])
    for side in ("a_RI", "b_OR"):
        expected = sum(w / 8 * getattr(f, side).double() for w, f in zip([1, 2, 5], experts, strict=True))
        assert torch.allclose(getattr(found, side).double(), expected, rtol=1e-6, atol=1e-6)


def test_the_average_of_copies_is_one_of_them_and_an_absent_layer_is_zeros() -> None:
    expert = factors(0, 3, bias_O=torch.ones(5))
    assert torch.allclose(dense(factor_average([expert] * 4, [1.0, 2.0, 3.0, 4.0])), dense(expert), rtol=1e-5, atol=1e-6)
    half = factor_average([expert, None], [1.0, 1.0])
    assert torch.allclose(dense(half), dense(expert) / 4, rtol=1e-5, atol=1e-6)
    assert torch.equal(half.bias_O, torch.full((5,), 0.5))


def test_an_average_over_a_sum_of_zero_is_refused() -> None:
    with pytest.raises(WeightingError, match="divides by the sum of the weights"):
        factor_average([factors(0, 1), factors(1, 1)], [1.0, -1.0])


@pytest.mark.parametrize("method", [factor_ties, factor_dare_ties])
def test_biases_go_through_the_rule_with_whole_weights(method) -> None:
    biases = [torch.tensor([3.0, -1.0, 0.0, 2.0, 1.0]), torch.tensor([1.0, 4.0, 0.0, -1.0, 1.0])]
    experts = [factors(seed, 1, bias_O=bias) for seed, bias in enumerate(biases)]
    extra = {"seeds": [1, 2, 3]} if method is factor_dare_ties else {}
    found = method([*experts, factors(2, 1)], [0.5, 2.0, 1.0], density=1.0, **extra)
    # elected: + + (0) + +; those of that sign, weighted, over their number
    assert found.bias_O.tolist() == pytest.approx([(1.5 + 2) / 2, 8.0, 0.0, 1.0, (0.5 + 2) / 2])


def expected_dare(stack: Sequence[Tensor], masks: Sequence[Tensor], density: float, roots: Sequence[float]) -> Tensor:
    return sum(root * t.double() * m / density for root, t, m in zip(roots, stack, masks, strict=True))


def test_dare_drops_entries_and_rescales_the_rest_of_each_factor() -> None:
    density, weights = 0.4, [2.0, -0.5]
    # factors without zeros, so that what was dropped is seen in a merge of one expert
    experts = [Factors(f.a_RI + 10, f.b_OR + 10) for f in (factors(0, 3, 40, 50), factors(1, 3, 40, 50))]
    alone = [factor_dare_linear([f], [1.0], seeds=[seed], density=density) for f, seed in zip(experts, (5, 6), strict=True)]
    together = factor_dare_linear(experts, weights, seeds=[5, 6], density=density)
    for side, signs in (("a_RI", (1, -1)), ("b_OR", (1, 1))):
        masks = [getattr(one, side) != 0 for one in alone]
        roots = [sign * math.sqrt(abs(w)) for sign, w in zip(signs, weights, strict=True)]
        expected = expected_dare([getattr(f, side) for f in experts], masks, density, roots)
        assert torch.allclose(getattr(together, side).double(), expected, rtol=1e-5, atol=1e-5)
        # four standard deviations of a binomial share
        for mask in masks:
            assert abs(float(mask.double().mean()) - density) < 4 * math.sqrt(density * (1 - density) / mask.numel())
        assert not torch.equal(*masks)


def test_dare_ties_elects_signs_among_what_stayed() -> None:
    density, experts = 0.5, [factors(seed, 3, 6, 9) for seed in range(3)]
    kept = [factor_dare_linear([f], [1.0], seeds=[seed], density=density) for seed, f in enumerate(experts)]
    found = factor_dare_ties(experts, [1.0, 1.0, 1.0], seeds=[0, 1, 2], density=density)
    for side in ("a_RI", "b_OR"):
        stack = torch.stack([getattr(one, side).double() for one in kept])
        expected = torch.zeros_like(stack[0])
        for place in torch.cartesian_prod(*[torch.arange(size) for size in expected.shape]):
            column = [float(layer[tuple(place)]) for layer in stack]
            sign = 1.0 if sum(column) >= 0 else -1.0
            agreeing = [value for value in column if value * sign > 0]
            expected[tuple(place)] = sum(agreeing) / max(len(agreeing), 1)
        assert torch.allclose(getattr(found, side).double(), expected, rtol=1e-5, atol=1e-6)


def call(name: str, experts: Sequence[Factors], **options: object) -> Factors:
    named = {str(number): expert for number, expert in enumerate(experts)}
    return MethodCall(name, options).combine("layer", named, [1.0] * len(named), seeds=list(range(len(named))))


@pytest.mark.parametrize("name", ["factor_ties", "factor_magnitude_prune", "factor_dare_linear", "factor_dare_ties"])
def test_a_density_of_zero_leaves_zeros(name: str) -> None:
    assert not dense(call(name, [factors(0, 2), factors(1, 2)], density=0.0)).any()


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("factor_linear", "linear"),
        ("factor_average", "average"),
        ("factor_ties", "ties_per_layer"),
        ("factor_dare_linear", "dare_linear"),
        ("factor_dare_ties", "dare_ties"),
        ("factor_magnitude_prune", "magnitude_prune"),
    ],
)
def test_different_ranks_are_refused_with_the_twin_on_updates(name: str, twin: str) -> None:
    assert twin in registry.names("methods")
    with pytest.raises(LayerMismatch, match=rf"{name}.*3 and 2: use {twin},"):
        call(name, [factors(0, 3), factors(1, 2)])


def test_of_equal_magnitudes_exactly_the_wanted_number_stays() -> None:
    expert = Factors(torch.ones(2, 5), torch.ones(4, 2))
    found = factor_magnitude_prune([expert], [1.0], density=0.3)
    assert (int(found.a_RI.count_nonzero()), int(found.b_OR.count_nonzero())) == (3, 2)
