"""Every registered method: numbers that cannot be merged are refused by name, before the method sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from properties import Properties

import loraweave as lw
from loraweave import registry
from loraweave.composer.composer import Composer
from loraweave.composer.merge.merge import merge
from loraweave.composer.merge.method_call import MethodCall, require_sound
from loraweave.errors import CompositionError, LoraweaveError, UnknownName, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.types import Factors

METHODS = registry.names("methods")
PROPERTIES = Properties(METHODS)
LAYERS = ("layers.0.q", "layers.0.v")
WRONG = ["a", None, [], {}, {1: 2}, float("nan"), float("inf"), -1, 2.5, True, 1e38, 10**400, object(), torch.ones(2)]


def factors(seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    # one a for all: a method may average b alone
    a_RI = torch.randn(2, 7, generator=torch.Generator().manual_seed(99))
    return Factors(a_RI, torch.randn(5, 2, generator=generator))


def adapter(name: str, seed: int) -> Adapter:
    return Adapter(name, "tiny", {layer: factors(10 * seed + place) for place, layer in enumerate(LAYERS)})


def recorded(of: Adapter) -> SimpleNamespace:
    x_NI = torch.randn(30, 7, generator=torch.Generator().manual_seed(5))
    gram_II, fisher_OI = x_NI.T @ x_NI / 30, torch.ones(5, 7)
    seen = SimpleNamespace(gram_II=gram_II, fisher_OI=fisher_OI, num_tokens=30, fisher_norm=None, turned=False)
    return SimpleNamespace(layers=dict.fromkeys(of.layers, seen), require_of=lambda name, content_hash: None)


def merged(method: str, adapters: list[Adapter], weights: Any, **options: Any) -> Adapter:
    if "statistics" in MethodCall(method).parameters:
        options["statistics"] = [recorded(each) for each in adapters]
    return merge(adapters, weights, method=method, progress=False, **options)


def spoilt(part: str, value: float) -> Adapter:
    good = adapter("spoilt", 1)
    tensor = getattr(good.layers[LAYERS[1]], part).clone()
    tensor[-1, 0] = value
    return replace(good, layers={**good.layers, LAYERS[1]: replace(good.layers[LAYERS[1]], **{part: tensor})})


def finite_or_refused(method: str, weight: float = 1.0, **options: Any) -> bool:
    """Whether a merge gives updates that are finite; else it must raise an error of ours."""
    try:
        found = merged(method, [adapter("a", 0), adapter("b", 1)], [weight, weight], **options)
    except LoraweaveError:
        return True
    return all(bool(torch.isfinite(found.delta(layer)).all()) for layer in found.layers)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_all_properties(method: str, request: pytest.FixtureRequest) -> None:
    PROPERTIES.walk(request, method, method=method)


@PROPERTIES.add()
def factors_in_memory_that_are_not_finite_are_named(method: str) -> None:
    for part in ("a_RI", "b_OR"):
        for value in (float("nan"), float("inf"), -float("inf")):
            says = f"1 of 1[04] values in {part} of adapter 'spoilt' are NaN or infinite in layer '{LAYERS[1]}'"
            with pytest.raises(CompositionError, match=says):
                merged(method, [adapter("a", 0), spoilt(part, value)], [1.0, 1.0])


@PROPERTIES.add()
def huge_weights_give_a_finite_update_or_are_refused(method: str) -> None:
    for weight in (1e19, 1e25, 1e30, 1e35, 1e36, 1e37, 1e38, 3e38, 1e300, -1e38):
        assert finite_or_refused(method, weight)


@pytest.mark.parametrize("weight", [1e37, 1e38, 1e300])
def test_a_weight_that_takes_an_update_beyond_fp32_is_named(weight: float) -> None:
    for method in ("linear", "sce", "average", "breadcrumbs", "svd", "ties"):
        with pytest.raises(CompositionError, match=r"'(a|b)' is up to .*its weight is .*use a smaller weight"):
            merged(method, [adapter("a", 0), adapter("b", 1)], [weight, weight])


def test_factors_whose_product_is_not_finite_are_named_and_large_ones_of_a_small_product_are_merged() -> None:
    large = Factors(torch.full((1, 7), 1e30), torch.full((5, 1), 1e30))
    with pytest.raises(CompositionError, match="update of 'huge' is up to 1e"):
        merge([Adapter("huge", "tiny", {LAYERS[0]: large})], [1.0])
    # both factors have large entries, which never meet
    uneven = Factors(torch.diag(torch.tensor([3e18, 1e-18])), torch.diag(torch.tensor([1e-18, 3e18])))
    found = merge([Adapter("uneven", "tiny", {LAYERS[0]: uneven})], [0.5])
    assert torch.allclose(found.delta(LAYERS[0]), 1.5 * torch.eye(2))


NO_WEIGHTS: list[tuple[Any, str]] = [
    (["a", "b"], "weight of adapter 'a' is 'a'; weights must be finite numbers"),
    (["1", "1"], "weight of adapter 'a' is '1'"),
    ([None, 1.0], "weight of adapter 'a' is None"),
    ([1.0, 1j], "weight of adapter 'b' is 1j"),
    ([[1.0], [1.0]], r"weight of adapter 'a' is \[1.0\]"),
    ([10**400, 1.0], "weight of adapter 'a' is 1000"),
    (1.0, "weights=1.0 is not a list of numbers; give one for each of 2 adapters"),
    (torch.tensor(1.0), "is not a list of numbers"),
    (torch.ones(2, 2), "is not a list of numbers"),
    ("ab", "weights='ab' is not a list of numbers"),
    ({"a": 1.0, "b": 1.0}, "is not a list of numbers"),
    ({0.5, 1.0}, "is not a list of numbers"),
    (iter([1.0, 1.0]), "is not a list of numbers"),
]


@PROPERTIES.add()
def weights_ranks_and_seeds_that_are_no_numbers_are_refused(method: str) -> None:
    adapters = [adapter("a", 0), adapter("b", 1)]
    for weights, says in NO_WEIGHTS:
        with pytest.raises(WeightingError, match=says):
            merged(method, adapters, weights)
    for rank in ("a", 2.5, True, 0, -1, float("nan"), [1]):
        with pytest.raises(WeightingError, match="is not a whole number of 1 or more; leave it out to keep the exact rank"):
            merged(method, adapters, [1.0, 1.0], rank=rank)
    for seed in ("x", None, 2.5, True, [0]):
        with pytest.raises(WeightingError, match=r"seed=.* is not a whole number"):
            merged(method, adapters, [1.0, 1.0], seed=seed)


@PROPERTIES.add()
def every_option_takes_its_kind_or_is_refused(method: str) -> None:
    for option in MethodCall(method).own_options:
        for value in WRONG:
            assert finite_or_refused(method, **{option: value})


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("ties", {"density": "a"}, "'ties' got density='a'; it takes a finite number"),
        ("ties", {"aggregate": 1}, "'ties' got aggregate=1; it takes one of 'mean', 'sum'"),
        ("ties_weighted", {"normalize": "yes"}, "'ties_weighted' got normalize='yes'; it takes True or False"),
    ],
)
def test_a_value_of_another_kind_is_named_with_what_the_option_takes(
    method: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(WeightingError, match=says):
        merged(method, [adapter("a", 0), adapter("b", 1)], [1.0, 1.0], **options)


@pytest.mark.parametrize("method", [None, 5, [], WeightingError])
def test_a_method_that_is_no_name_is_refused(method: Any) -> None:
    with pytest.raises(UnknownName, match="a method is given by its name or as a function"):
        merge([adapter("a", 0)], [1.0], method=method)


@pytest.mark.parametrize("statistics", ["x", [1, 2], 5, {}])
def test_statistics_that_are_none_are_refused(statistics: Any) -> None:
    with pytest.raises(WeightingError, match="is not a list of Statistics"):
        merge([adapter("a", 0), adapter("b", 1)], [1.0, 1.0], statistics=statistics)


@pytest.mark.parametrize(
    ("edit", "options", "says"),
    [
        (lambda b_OR: b_OR * 1e30, {}, "use a smaller weight"),
        (lambda b_OR: b_OR * float("nan"), {}, "NaN or infinite"),
        (None, {"seed": "x"}, "seed='x' is not a whole number"),
        (None, {"method": "ties", "density": "a"}, "it takes a finite number"),
        (None, {"method": "ties", "aggregate": None}, "it takes one of"),
        (None, {"method": None}, "a method is given by its name or as a function"),
    ],
)
def test_fused_refuses_the_same_and_leaves_the_model_as_it_was(
    tiny_llama: Any, make_adapter: Any, edit: Callable[..., Any] | None, options: dict[str, Any], says: str
) -> None:
    made = make_adapter(tiny_llama, "a")
    if edit is not None:
        made = replace(made, layers={n: replace(f, b_OR=edit(f.b_OR)) for n, f in made.layers.items()})
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    engine = Composer(tiny_llama, ExpertPool([made]))
    with pytest.raises(LoraweaveError, match=says), engine.fused({"a": 1e9}, **options):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())


def test_numbers_of_numpy_and_torch_are_weights() -> None:
    a, b = adapter("a", 0), adapter("b", 1)
    wanted = lw.merge([a, b], [0.5, 2.0]).hash
    assert merge([a, b], torch.tensor([0.5, 2.0])).hash == wanted  # type: ignore[arg-type]
    assert merge([a, b], torch.tensor([0.5, 2.0]).numpy()).hash == wanted  # type: ignore[arg-type]
    assert merge((a, b), (torch.tensor(0.5), 2)).hash == wanted  # type: ignore[arg-type]


def test_factors_that_learn_are_checked_like_others() -> None:
    made = factors(0)
    learning = Factors(torch.nn.Parameter(made.a_RI), torch.nn.Parameter(made.b_OR))
    require_sound(LAYERS[0], {"a": learning}, [1.0], "linear")
    with pytest.raises(CompositionError, match="use a smaller weight"):
        require_sound(LAYERS[0], {"a": learning}, [1e38], "linear")


# a method that draws at random draws for the hash of each adapter, which has the kind in it
@PROPERTIES.add(of=[name for name in METHODS if "seeds" not in MethodCall(name).parameters])
def an_expert_of_a_fused_parameter_is_merged_as_the_linear_layer_of_its_matrix(method: str) -> None:
    linear = [adapter("a", 1), adapter("b", 2)]
    experts = [
        replace(each, layers={layer: replace(part, kind="expert") for layer, part in each.layers.items()}) for each in linear
    ]
    expected, found = (merged(method, each, [0.4, 0.7]) for each in (linear, experts))
    assert {part.kind for part in found.layers.values()} == {"expert"}
    assert found.layers.keys() == expected.layers.keys()
    for layer in expected.layers:
        torch.testing.assert_close(found.delta(layer), expected.delta(layer))
