"""knots merges the pieces S V_e^T of the updates side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import dense_array as dense
from tiny_models import random_factors

from loraweave.composer.merge.merge import layer_updates, merge
from loraweave.composer.merge.method_call import MethodCall
from loraweave.composer.merge.methods.knots import knots
from loraweave.errors import WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

factors = partial(random_factors, num_out=6, num_in=8)


def pieces(experts: Sequence[Factors]) -> tuple[np.ndarray, list[np.ndarray]]:
    """U and the S V_e^T of the definition: one dense SVD of [D_1 | ... | D_E]."""
    deltas = [dense(f) for f in experts]
    u, s, vh = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    rank = int((s > 1e-5).sum())
    return u[:, :rank], np.hsplit(np.diag(s[:rank]) @ vh[:rank], len(deltas))


def ties(matrices: Sequence[np.ndarray], weights: Sequence[float], density: float) -> np.ndarray:
    """Entry by entry: keep the largest of each, elect the sign of their sum, average those that agree."""
    kept = []
    for m in matrices:
        bound = np.sort(np.abs(m).ravel())[::-1][int(density * m.size) - 1]
        kept.append(np.where(np.abs(m) >= bound, m, 0.0))
    out = np.zeros_like(kept[0])
    for place in np.ndindex(out.shape):
        values = [m[place] for m in kept]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agree = [w * x for w, x in zip(weights, values, strict=True) if x * sign > 0]
        out[place] = sum(agree) / len(agree) if agree else 0.0
    return out


@pytest.mark.parametrize("ranks", [(2, 1, 2), (3, 3, 3)])
@pytest.mark.parametrize("density", [0.25, 0.75])
def test_ties_by_layer_is_applied_to_the_pieces(ranks: tuple[int, ...], density: float) -> None:
    experts, weights = [factors(seed, rank) for seed, rank in enumerate(ranks)], [1.0, 0.5, -2.0]
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
        layer: replace(made := factors(10 * seed + place, 2, num_in=num_in), b_OR=made.b_OR * size)
        for place, (layer, (size, num_in)) in enumerate(sizes.items())
    }
    return Adapter(name, "tiny", layers)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_by_default_ties_trims_the_pieces_of_all_layers_together(density: float) -> None:
    adapters = [uneven(name, seed) for seed, name in enumerate("abc")]
    found = merge(adapters, [1.0] * 3, method="knots", inner_options={"density": density}, progress=False)
    expected = published([[dense(each.layers[layer]) for each in adapters] for layer in adapters[0].layers], density)
    by_layer = merge(
        adapters, [1.0] * 3, method="knots", inner="ties_per_layer", inner_options={"density": density}, progress=False
    )
    for layer, wanted in zip(adapters[0].layers, expected, strict=True):
        assert np.abs(found.delta(layer).numpy() - wanted).max() < 1e-5
        assert np.abs(by_layer.delta(layer).numpy() - wanted).max() > 0.1


def test_without_a_survey_a_layer_is_all_layers() -> None:
    experts = [factors(0, 2), factors(1, 3)]
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
    assert len(dict(layer_updates(call, experts, hashes, weights, seed=0))) == 2
    with pytest.raises(WeightingError, match="'knots' looks at all layers together and takes one weight per adapter"):
        dict(layer_updates(MethodCall("knots"), experts, hashes, weights, seed=0))


def test_with_a_linear_rule_it_changes_nothing() -> None:
    experts, weights = [factors(0, 2), factors(1, 4), factors(2, 1)], [0.7, -0.4, 2.0]
    expected = sum(w * dense(f) for w, f in zip(weights, experts, strict=True))
    for inner in ("linear", "magnitude_prune"):
        options = {"density": 1.0} if inner == "magnitude_prune" else {}
        found = knots(experts, weights, inner=inner, inner_options=options)
        assert np.abs(dense(found) - expected).max() < 1e-5


def test_the_pieces_carry_their_singular_values() -> None:
    # the other reading, V_e^T merged and multiplied by S afterwards, is another method
    experts = [factors(0, 2), factors(1, 2)]
    deltas = [dense(f) for f in experts]
    u, s, vh = np.linalg.svd(np.hstack(deltas), full_matrices=False)
    other = u[:, :4] @ np.diag(s[:4]) @ ties(np.hsplit(vh[:4], 2), [1.0, 1.0], 0.25)
    assert (
        np.abs(dense(knots(experts, [1.0, 1.0], inner="ties_per_layer", inner_options={"density": 0.25})) - other).max()
        > 0.1
    )


def test_two_equal_experts_share_one_space_and_count_once() -> None:
    f = factors(0, 2)
    found = knots([f, f], [1.0, 1.0], inner_options={"density": 1.0})
    assert found.rank == 2
    assert np.abs(dense(found) - dense(f)).max() < 1e-5


def test_opposites_leave_nothing() -> None:
    f = factors(0, 2)
    assert not dense(knots([f, Factors(f.a_RI, -f.b_OR)], [1.0, 1.0], inner="linear")).round(6).any()


def test_a_bias_follows_the_inner_rule_and_the_scale() -> None:
    experts = [factors(0, 2, bias_O=torch.full((6,), 2.0)), factors(1, 1, bias_O=torch.full((6,), -1.0))]
    elected = knots(experts, [1.0, 3.0], inner="ties_per_layer", inner_options={"density": 1.0}, scale=0.5)
    assert torch.equal(elected.bias_O, torch.full((6,), 1.0))
    assert torch.equal(knots(experts, [1.0, 3.0], inner="linear").bias_O, torch.full((6,), -1.0))
