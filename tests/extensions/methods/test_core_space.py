"""core_space merges U^T D V in the space that all experts span, knots U^T D, and neither loses anything on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave import registry
from loraweave.composer.merge.merge import layer_calls, layer_updates, merge
from loraweave.composer.merge.method_call import DenseUpdate, MethodCall
from loraweave.errors import UnknownName, WeightingError
from loraweave.extensions.methods.methods import _inner
from loraweave.extensions.methods.methods.core_space import core_space
from loraweave.extensions.methods.methods.knots import knots
from loraweave.extensions.methods.methods.pico import pico
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

# of an extension, which may not be there
BY_DATA = [name for name in registry.names("methods") if "statistics" in MethodCall(name).parameters]
factors = partial(random_factors, num_out=9, num_in=11)


def turned(f: Factors, seed: int) -> Factors:
    turn = torch.randn(f.rank, f.rank, generator=torch.Generator().manual_seed(seed)).double() + 3 * torch.eye(f.rank)
    return Factors((turn @ f.a_RI.double()).float(), (f.b_OR.double() @ torch.linalg.inv(turn)).float())


def trimmed(m: np.ndarray, density: float) -> np.ndarray:
    """All but the int(density * entries) largest magnitudes set to zero."""
    order = np.argsort(-np.abs(m).ravel(), kind="stable")
    kept = np.zeros(m.size)
    kept[order[: int(density * m.size)]] = 1.0
    return m * kept.reshape(m.shape)


def ties(matrices: Sequence[np.ndarray], weights: Sequence[float], density: float) -> np.ndarray:
    """Trim, elect the sign of the unweighted sum, average the weighted entries that agree (Yadav et al. 2023, as PEFT)."""
    kept = [trimmed(m, density) for m in matrices]
    sign = np.where(sum(kept) >= 0, 1.0, -1.0)
    agree = [(m != 0) & (np.sign(m) == sign) for m in kept]
    number = np.maximum(sum(a.astype(int) for a in agree), 1)
    return sum(w * m * a for w, m, a in zip(weights, kept, agree, strict=True)) / number


def published_cores(experts: Sequence[Factors]) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """As the authors make them: thin SVDs of the b side by side and of the a one above the other, whatever their ranks."""
    u = np.linalg.svd(np.hstack([f.b_OR.double().numpy() for f in experts]), full_matrices=False)[0]
    v = np.linalg.svd(np.vstack([f.a_RI.double().numpy() for f in experts]), full_matrices=False)[2].T
    return u, [u.T @ dense(f) @ v for f in experts], v


def cores(experts: Sequence[Factors]) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """The definition by updates: singular vectors of them side by side and one above the other, the rank of each."""
    deltas = [dense(f) for f in experts]
    side, above = np.hstack(deltas), np.vstack(deltas)
    u = np.linalg.svd(side)[0][:, : np.linalg.matrix_rank(side, tol=1e-4)]
    v = np.linalg.svd(above)[2][: np.linalg.matrix_rank(above, tol=1e-4)].T
    return u, [u.T @ d @ v for d in deltas], v


@pytest.mark.parametrize("ranks", [(1, 4, 3), (2, 2), (5, 5, 5), (9, 9)])
def test_with_linear_it_is_the_weighted_sum(ranks: tuple[int, ...]) -> None:
    experts = [factors(seed, rank) for seed, rank in enumerate(ranks)]
    weights = [0.7, -0.4, 2.0][: len(ranks)]
    expected = sum(w * dense(f) for w, f in zip(weights, experts, strict=True))
    found = core_space(experts, weights, inner="linear")
    assert np.abs(dense(found) - expected).max() < 1e-5
    assert found.rank <= sum(ranks)


SHAPES = {
    "ranks apart": ((2, 1, 3), 9, 11),
    "more ranks than dimensions": ((3, 3, 3, 3), 5, 7),
    "one side full": ((4, 4), 5, 30),
}


@pytest.mark.parametrize("density", [0.2, 0.6])
@pytest.mark.parametrize(("ranks", "num_out", "num_in"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("basis", "cores_of"), [("factors", published_cores), ("updates", cores)])
def test_ties_is_applied_to_the_cores(
    ranks: tuple[int, ...], num_out: int, num_in: int, basis: str, cores_of: Callable[..., Any], density: float
) -> None:
    experts = [factors(seed, rank, num_out=num_out, num_in=num_in) for seed, rank in enumerate(ranks)]
    weights = [1.0, 0.5, -2.0, 0.7][: len(ranks)]
    u, matrices, v = cores_of(experts)
    expected = u @ ties(matrices, weights, density) @ v.T
    found = core_space(experts, weights, basis=basis, inner_options={"density": density})
    assert np.abs(dense(found) - expected).max() < 1e-5
    assert found.rank <= min(num_out, sum(ranks))


@pytest.mark.parametrize("density", [0.1, 0.2])
def test_the_published_basis_is_the_one_by_default_and_counts_the_zeros_of_a_shared_a(density: float) -> None:
    # one a for all: v has three directions and the stack nine rows, so that the cores have six columns of zeros
    experts = [
        replace(factors(seed, 3, num_out=12, num_in=11), a_RI=factors(7, 3, num_out=12, num_in=11).a_RI) for seed in range(3)
    ]
    u, matrices, v = published_cores(experts)
    assert matrices[0].shape == (9, 9)
    expected = u @ ties([m.round(9) for m in matrices], [1.0] * 3, density) @ v.T
    found = core_space(experts, [1.0] * 3, inner_options={"density": density})
    assert np.abs(dense(found) - expected).max() < 1e-5
    other = core_space(experts, [1.0] * 3, inner_options={"density": density}, basis="updates")
    assert np.abs(dense(other) - expected).max() > 0.1


def test_the_published_basis_depends_on_the_factors_and_that_of_updates_does_not() -> None:
    experts, options = [factors(0, 2), factors(1, 3)], {"density": 0.5}
    split = [turned(f, seed) for seed, f in enumerate(experts)]
    one, other = (dense(core_space(each, [1.0, 1.0], inner_options=options)) for each in (experts, split))
    assert np.abs(one - other).max() > 0.1
    for each in (experts, split):
        u, matrices, v = published_cores(each)
        expected = u @ ties(matrices, [1.0, 1.0], 0.5) @ v.T
        assert np.abs(dense(core_space(each, [1.0, 1.0], inner_options=options)) - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("inner", "options"), [("tsv", {"k": 9}), ("iso_c", {}), ("iso_cts", {}), ("wudi", {"minimiser": "exact"})]
)
def test_rules_on_singular_values_give_what_they_give_without_it(inner: str, options: dict[str, object]) -> None:
    experts, weights = [factors(0, 2), factors(1, 1), factors(2, 3)], [1.0, 0.5, -2.0]
    direct = registry.get("methods", inner)(experts, weights, **options)
    found = core_space(experts, weights, inner=inner, inner_options=options)
    assert np.abs(dense(found) - dense(direct)).max() < 1e-4


def test_the_method_by_default_is_ties_per_layer() -> None:
    experts = [factors(0, 2), factors(1, 3)]
    by_name = core_space(experts, [1.0, 1.0], inner="ties_per_layer")
    assert torch.equal(core_space(experts, [1.0, 1.0]).b_OR, by_name.b_OR)


def test_experts_that_share_no_direction_do_not_disturb_each_other() -> None:
    # in the joint basis their entries stand at different places, and every one is the only one there
    first, second = factors(0, 2), factors(1, 2)
    first = Factors(torch.cat([first.a_RI[:, :5], torch.zeros(2, 6)], 1), torch.cat([first.b_OR[:4], torch.zeros(5, 2)]))
    second = Factors(torch.cat([torch.zeros(2, 5), second.a_RI[:, 5:]], 1), torch.cat([torch.zeros(4, 2), second.b_OR[4:]]))
    found = core_space([first, second], [1.0, 1.0], inner_options={"density": 1.0})
    assert np.abs(dense(found) - dense(first) - dense(second)).max() < 1e-5


def test_with_the_basis_of_updates_only_they_count_and_in_both_not_their_order() -> None:
    experts, weights = [factors(0, 2), factors(1, 1), factors(2, 3)], [1.0, 0.5, -2.0]
    options: dict[str, Any] = {"basis": "updates", "inner_options": {"density": 0.5}}
    found = core_space(experts, weights, **options)
    split = core_space([turned(f, seed) for seed, f in enumerate(experts)], weights, **options)
    assert np.abs(dense(found) - dense(split)).max() < 1e-4
    for basis in ("factors", "updates"):
        options["basis"] = basis
        forth, back = core_space(experts, weights, **options), core_space(experts[::-1], weights[::-1], **options)
        assert np.abs(dense(forth) - dense(back)).max() < 1e-5


def test_no_direction_of_an_expert_is_lost_however_small_it_is_beside_the_others() -> None:
    small = Factors(factors(1, 2).a_RI, factors(1, 2).b_OR * 1e-7)
    expected = dense(factors(0, 2)) + 1e7 * dense(small)
    for basis in ("factors", "updates"):
        found = core_space([factors(0, 2), small], [1.0, 1e7], inner="linear", basis=basis)
        assert np.abs(dense(found) - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_inner_method_gets_cores_and_seeds_of_each_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def probe(
        experts: Sequence[Factors | None], weights: Sequence[float], *, depth: int = 1, seeds: Sequence[int]
    ) -> DenseUpdate:
        seen.update(experts=experts, weights=weights, depth=depth, seeds=seeds)
        return DenseUpdate(sum(w * f.b_OR @ f.a_RI for w, f in zip(weights, experts, strict=True) if f is not None))

    module = ModuleType("probe")
    module.probe = probe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "probe", module)
    for module in (registry, _inner):
        monkeypatch.setattr(module, "get", lambda folder, name: probe)
    experts = [factors(0, 2), None, factors(1, 1), factors(5, 1)]
    found = core_space(
        experts, [0.5, 1.0, 2.0, 0.0], inner="probe", inner_options={"depth": 3}, seeds=[11, 12, 13, 14], scale=2.0
    )
    given = seen["experts"]
    assert [None if f is None else (tuple(f.b_OR.shape), tuple(f.a_RI.shape)) for f in given] == [
        ((3, 2), (2, 3)),
        None,
        ((3, 1), (1, 3)),
        None,
    ]
    assert (seen["weights"], seen["depth"], seen["seeds"]) == ([0.5, 1.0, 2.0, 0.0], 3, [11, 12, 13, 14])
    assert np.abs(dense(found) - dense(experts[0]) - 4.0 * dense(experts[2])).max() < 1e-5


def test_random_rules_work_and_depend_on_the_seeds() -> None:
    experts = [factors(0, 2), factors(1, 2)]
    options = {"inner": "dare_linear", "inner_options": {"density": 0.5}}
    one, same, other = (core_space(experts, [1.0, 1.0], seeds=seeds, **options) for seeds in ([1, 2], [1, 2], [3, 4]))
    assert torch.equal(one.b_OR, same.b_OR)
    assert np.abs(dense(one) - dense(other)).max() > 0.1
    with pytest.raises(WeightingError, match="random and needs a seed for each of 2 experts, got 0"):
        core_space(experts, [1.0, 1.0], **options)


def test_biases_are_merged_by_the_inner_rule() -> None:
    experts = [factors(0, 2, bias_O=torch.full((9,), 2.0)), factors(1, 1), factors(2, 1, bias_O=torch.full((9,), -1.0))]
    added = core_space(experts, [1.0, 1.0, 3.0], inner="linear", scale=2.0)
    assert torch.equal(added.bias_O, torch.full((9,), -2.0))
    elected = core_space(experts, [1.0, 1.0, 3.0], inner_options={"density": 1.0})
    assert torch.equal(elected.bias_O, torch.full((9,), 2.0))


def test_an_expert_of_zeros_and_experts_that_cancel() -> None:
    zero, f = Factors(torch.zeros(2, 11), torch.zeros(9, 2)), factors(0, 2)
    assert np.abs(dense(core_space([zero, f], [1.0, 1.0], inner="linear")) - dense(f)).max() < 1e-5
    assert not dense(core_space([f, Factors(f.a_RI, -f.b_OR)], [1.0, 1.0], inner="linear")).round(6).any()


@pytest.mark.parametrize("method", [core_space, knots, pico])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inner": "itself"}, WeightingError, r"inner='\w+' is the method itself"),
        ({"inner": "factor_sum"}, WeightingError, "inner='factor_sum' mixes the factors a and b"),
        ({"inner": "lego"}, WeightingError, "inner='lego' mixes the factors"),
        *(({"inner": name}, WeightingError, f"inner='{name}' needs statistics") for name in BY_DATA),
        ({"inner": "tiess"}, UnknownName, "did you mean 'ties'"),
        (
            {"inner": "ties_per_layer", "inner_options": {"densty": 0.2}},
            WeightingError,
            "no option 'densty', did you mean 'density'",
        ),
    ],
)
def test_an_inner_rule_that_they_cannot_use_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, method: Callable[..., object]
) -> None:
    options = {"inner": method.__name__} if options == {"inner": "itself"} else options
    with pytest.raises(error, match=message):
        method([factors(0, 2)], [1.0], **options)


small = partial(random_factors, num_out=6, num_in=8)


def pieces(experts: Sequence[Factors]) -> tuple[np.ndarray, list[np.ndarray]]:
    """U and the S V_e^T of the definition: one dense SVD of [D_1 | ... | D_E]."""
    deltas = [dense(f) for f in experts]
    u, s, vh = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    rank = int((s > 1e-5).sum())
    return u[:, :rank], np.hsplit(np.diag(s[:rank]) @ vh[:rank], len(deltas))


@pytest.mark.parametrize("ranks", [(2, 1, 2), (3, 3, 3)])
@pytest.mark.parametrize("density", [0.25, 0.75])
def test_knots_applies_ties_by_layer_to_the_pieces(ranks: tuple[int, ...], density: float) -> None:
    experts, weights = [small(seed, rank) for seed, rank in enumerate(ranks)], [1.0, 0.5, -2.0]
    u, matrices = pieces(experts)
    expected = 0.6 * u @ ties(matrices, weights, density)
    found = knots(experts, weights, inner="ties_per_layer", inner_options={"density": density}, scale=0.6)
    assert np.abs(dense(found) - expected).max() < 1e-5
    assert found.rank <= min(sum(ranks), 6)


def published(layers: Sequence[Sequence[np.ndarray]], density: float) -> list[np.ndarray]:
    """KnOTS with TIES as its authors have it: one vector of the pieces of all layers for each expert, trimmed as a whole."""
    bases, flat = [], []
    for deltas in layers:
        u, s, vh = np.linalg.svd(np.hstack(deltas), full_matrices=False)
        rank = int((s > 1e-5).sum())
        bases.append(u[:, :rank])
        flat.append(np.stack([piece.ravel() for piece in np.hsplit(np.diag(s[:rank]) @ vh[:rank], len(deltas))]))
    vectors = np.concatenate(flat, axis=1)
    bounds = np.sort(np.abs(vectors), axis=1)[:, -int(density * vectors.shape[1])][:, None]
    kept = np.where(np.abs(vectors) >= bounds, vectors, 0.0)
    sign = np.sign(kept.sum(axis=0))
    sign[sign == 0] = np.sign(sign.sum())
    agree = (kept * sign) > 0
    merged = (kept * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    ends = np.cumsum([0, *(part.shape[1] for part in flat)])
    rows = np.split(merged, ends[1:-1])
    return [u @ row.reshape(u.shape[1], -1) for u, row in zip(bases, rows, strict=True)]


def uneven(name: str, seed: int) -> Adapter:
    """An adapter whose second layer has updates four times as large as the first, and whose third is of another shape."""
    sizes = {"first": (1.0, 8), "second": (4.0, 8), "third": (0.5, 5)}
    layers = {
        layer: replace(made := small(10 * seed + place, 2, num_in=num_in), b_OR=made.b_OR * size)
        for place, (layer, (size, num_in)) in enumerate(sizes.items())
    }
    return Adapter(name, "tiny", layers)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_by_default_ties_in_knots_trims_the_pieces_of_all_layers_together(density: float) -> None:
    adapters = [uneven(name, seed) for seed, name in enumerate("abc")]
    found = merge(adapters, [1.0] * 3, method="knots", inner_options={"density": density}, progress=False)
    expected = published([[dense(each.layers[layer]) for each in adapters] for layer in adapters[0].layers], density)
    by_layer = merge(
        adapters, [1.0] * 3, method="knots", inner="ties_per_layer", inner_options={"density": density}, progress=False
    )
    for layer, wanted in zip(adapters[0].layers, expected, strict=True):
        assert np.abs(found.delta(layer).numpy() - wanted).max() < 1e-5
        assert np.abs(by_layer.delta(layer).numpy() - wanted).max() > 0.1


def test_without_a_survey_a_layer_of_knots_is_all_layers() -> None:
    experts = [small(0, 2), small(1, 3)]
    wanted = published([[dense(f) for f in experts]], 0.5)[0]
    assert np.abs(dense(knots(experts, [1.0, 1.0], inner_options={"density": 0.5})) - wanted).max() < 1e-5


def test_layers_that_an_expert_lacks_and_updates_of_zeros_are_surveyed_too() -> None:
    a, b = uneven("a", 0), uneven("b", 1)
    nothing = Factors(torch.zeros(1, 5), torch.zeros(6, 1))
    some = replace(b, layers={"second": b.layers["second"], "third": nothing})
    found = merge([a, some], [1.0, 1.0], method="knots", progress=False)
    zero = {"first": np.zeros((6, 8)), "third": np.zeros((6, 5))}
    pairs = [[dense(a.layers[n]), zero.get(n, dense(b.layers[n]) if n == "second" else None)] for n in a.layers]
    for layer, wanted in zip(a.layers, published(pairs, 0.2), strict=True):
        got = found.delta(layer).numpy() if layer in found.layers else np.zeros_like(wanted)
        assert np.abs(got - wanted).max() < 1e-5


def test_weights_by_layer_need_an_inner_rule_that_looks_at_one_layer() -> None:
    adapters = {name: uneven(name, seed) for seed, name in enumerate("ab")}
    weights = {"first": {"a": 1.0, "b": 0.5}, "second": {"a": 0.5, "b": 1.0}}
    experts = {name: each.layers for name, each in adapters.items()}
    hashes = {name: each.hash for name, each in adapters.items()}
    call = MethodCall("knots", {"inner": "ties_per_layer"})
    assert len(dict(layer_updates(layer_calls(call, experts, hashes, weights, seed=0)))) == 2
    with pytest.raises(WeightingError, match="'knots' looks at all layers together and takes one weight per adapter"):
        dict(layer_updates(layer_calls(MethodCall("knots"), experts, hashes, weights, seed=0)))


def test_knots_with_a_linear_rule_changes_nothing() -> None:
    experts, weights = [small(0, 2), small(1, 4), small(2, 1)], [0.7, -0.4, 2.0]
    expected = sum(w * dense(f) for w, f in zip(weights, experts, strict=True))
    for inner in ("linear", "magnitude_prune"):
        options = {"density": 1.0} if inner == "magnitude_prune" else {}
        found = knots(experts, weights, inner=inner, inner_options=options)
        assert np.abs(dense(found) - expected).max() < 1e-5


def test_the_pieces_carry_their_singular_values() -> None:
    # the other reading, V_e^T merged and multiplied by S afterwards, is another method
    experts = [small(0, 2), small(1, 2)]
    deltas = [dense(f) for f in experts]
    u, s, vh = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    other = u[:, :4] @ np.diag(s[:4]) @ ties(np.hsplit(vh[:4], 2), [1.0, 1.0], 0.25)
    assert (
        np.abs(dense(knots(experts, [1.0, 1.0], inner="ties_per_layer", inner_options={"density": 0.25})) - other).max()
        > 0.1
    )


def test_two_equal_experts_of_knots_share_one_space_and_count_once() -> None:
    f = small(0, 2)
    found = knots([f, f], [1.0, 1.0], inner_options={"density": 1.0})
    assert found.rank == 2
    assert np.abs(dense(found) - dense(f)).max() < 1e-5


def test_opposites_leave_nothing_of_knots() -> None:
    f = small(0, 2)
    assert not dense(knots([f, Factors(f.a_RI, -f.b_OR)], [1.0, 1.0], inner="linear")).round(6).any()


def test_a_bias_of_knots_follows_the_inner_rule_and_the_scale() -> None:
    experts = [small(0, 2, bias_O=torch.full((6,), 2.0)), small(1, 1, bias_O=torch.full((6,), -1.0))]
    elected = knots(experts, [1.0, 3.0], inner="ties_per_layer", inner_options={"density": 1.0}, scale=0.5)
    assert torch.equal(elected.bias_O, torch.full((6,), 1.0))
    assert torch.equal(knots(experts, [1.0, 3.0], inner="linear").bias_O, torch.full((6,), -1.0))
