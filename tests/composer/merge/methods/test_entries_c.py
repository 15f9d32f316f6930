"""Entries by the library of entries.c against its twin in PyTorch: the same bits where nothing rounds, cuts by sorting."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tiny_models import random_factors

from loraweave.composer.merge.method_call import terms
from loraweave.composer.merge.methods import _entries, _pruning
from loraweave.composer.merge.methods._entries import Entries, tensors
from loraweave.composer.merge.methods._pruning import kth_largest
from loraweave.composer.merge.methods.dare_linear import dare_linear
from loraweave.composer.merge.methods.dare_ties import dare_ties
from loraweave.composer.merge.methods.ties import ties
from loraweave.composer.merge.methods.ties_per_layer import ties_per_layer
from loraweave.extensions.methods.methods.magnitude_prune import magnitude_prune
from loraweave.extensions.methods.methods.ties_count import ties_count
from loraweave.extensions.methods.methods.ties_weighted import ties_weighted
from loraweave.types import Factors

needs_the_library = pytest.mark.skipif(_entries.library() is None, reason="there is no C compiler")
WEIGHTS, SEEDS = [1.0, -2.0, 0.5, 1.0], [3, 2**63 - 1, 0, 7]
METHODS = {
    "ties": ties,
    "ties, sum": partial(ties, aggregate="sum"),
    "ties_per_layer": ties_per_layer,
    "ties_per_layer, frequency": partial(ties_per_layer, majority="frequency", scale=0.5),
    "ties_weighted": ties_weighted,
    "ties_weighted, frequency": partial(ties_weighted, majority="frequency", normalize=False),
    "ties_count": ties_count,
    "magnitude_prune": magnitude_prune,
    "dare_linear": partial(dare_linear, seeds=SEEDS),
    "dare_ties": partial(dare_ties, seeds=SEEDS, majority="frequency"),
}


def whole(seed: int, rank: int, shape: tuple[int, int], **parts: torch.Tensor) -> Factors:
    """Small whole numbers, so that no product is rounded and many magnitudes are equal."""
    update = random_factors(seed, rank, *shape)
    return Factors(update.a_RI.round(), update.b_OR.round(), **parts)


@needs_the_library
@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 67), (70, 131), (1, 400)])
@pytest.mark.parametrize("method", METHODS)
def test_it_makes_the_same_bits_as_its_twin_where_nothing_is_rounded(method, shape, monkeypatch) -> None:
    bias_O = torch.arange(shape[0]).float() - 2
    experts = [whole(0, 16, shape, bias_O=bias_O), whole(1, 1, shape), whole(2, 5, shape), whole(3, 0, shape)]
    for density in (0.0, 0.25, 0.5, 1.0):
        found = METHODS[method](experts, WEIGHTS, density=density)
        with monkeypatch.context() as without:
            without.setattr(_entries, "library", lambda: None)
            twin = METHODS[method](experts, WEIGHTS, density=density)
        assert torch.equal(found.delta_OI, twin.delta_OI)
        assert torch.equal(found.bias_O, twin.bias_O)


@needs_the_library
@pytest.mark.parametrize("method", METHODS)
def test_it_keeps_the_entries_that_its_twin_keeps(method, monkeypatch) -> None:
    experts = [random_factors(seed, 4 + seed, 130, 257) for seed in range(4)]
    found = METHODS[method](experts, WEIGHTS, density=0.3).delta_OI
    monkeypatch.setattr(_entries, "library", lambda: None)
    twin = METHODS[method](experts, WEIGHTS, density=0.3).delta_OI
    # an entry that is at a cut to rounding may fall on either side of it
    assert int(((found - twin).abs() > 1e-5).sum()) <= 2


@pytest.mark.parametrize(("last", "mean"), [(1.0, 2.0**24), (-1.0, -(2.0**24)), (0.0, 2.0**25)])
def test_an_election_that_fp32_would_round_is_decided_in_float64(entries_way, last, mean) -> None:
    large = torch.full((1, 70), 2.0**25)
    columns = [torch.full((1, 70), last), large, -large]
    experts = [Factors(column, torch.ones(5, 1)) for column in columns]
    found = ties_per_layer(experts, [1.0, 1.0, 1.0], density=1.0).delta_OI
    # the sum as fp32 rounds it is 0 in all three
    assert torch.equal(found, torch.full((5, 70), mean))


def entries_of(update: Factors) -> Entries:
    return next(tensors(terms([update], [1.0])))


@pytest.mark.parametrize("what", ["normal", "equal", "few values", "the sample is no sample", "mostly zeros"])
def test_the_cut_is_that_of_a_sorted_list_whatever_a_sample_says(entries_way, what) -> None:
    shape = (130, 260)
    update = whole(0, 2, shape) if what == "few values" else random_factors(0, 3, *shape)
    if what == "equal":
        update = Factors(torch.ones(1, 260), torch.ones(130, 1))
    elif what == "the sample is no sample":
        update.b_OR[::4] *= 1e-3
    elif what == "mostly zeros":
        update.b_OR[1:] = 0
    entries = entries_of(update)
    assert entries.size > _pruning.SAMPLED
    values = entries.read(0, slice(0, 130), torch.empty(shape)).abs().flatten().numpy()
    ordered = np.sort(values)[::-1]
    for count in (1, 2, 259, 16_900, 33_000, 33_799, 33_800):
        value, among, equal = kth_largest([(entries, 0)], count)
        assert value == ordered[count - 1]
        assert (among, equal) == (count - int((values > value).sum()), int((values == value).sum()))


@pytest.mark.parametrize("block", [200, 2**15], ids=["many parts", "one part"])
def test_of_equal_entries_the_earlier_are_kept_wherever_they_lie(entries_way, monkeypatch, block) -> None:
    monkeypatch.setattr(_entries, "BLOCK", block)
    entries = entries_of(whole(0, 2, (330, 52)))
    assert entries.size > _pruning.SAMPLED
    values = entries.read(0, slice(0, 330), torch.empty(entries.shape)).abs().flatten().numpy()
    order = np.argsort(-values, kind="stable")
    for count in (1, 700, 5_000, 9_000, int((values > 0).sum())):
        (cut,) = _pruning.keep_largest(entries, count)
        place = np.arange(len(values))
        kept = (values > cut.value) | ((values == cut.value) & (place <= cut.last))
        assert np.array_equal(np.flatnonzero(kept), np.sort(order[:count]))


def test_a_smaller_sample_is_a_part_of_the_larger(entries_way, monkeypatch) -> None:
    entries = entries_of(random_factors(0, 3, 96, 320))
    every = entries.sample(0)
    assert len(every) == 24 * 40
    monkeypatch.setattr(_entries, "SAMPLE", 100)
    some = entries.sample(0)
    assert len(some) == pytest.approx(len(every) / 9, rel=0.2)
    assert np.abs(some[:, None] - every).min(axis=1).max() < 1e-5


def test_the_cut_of_several_tensors_is_that_of_their_entries_together(entries_way) -> None:
    parts = [entries_of(random_factors(seed, 2, *shape)) for seed, shape in enumerate([(140, 150), (3, 5), (90, 70)])]
    values = np.concatenate(
        [each.read(0, slice(0, each.shape[0]), torch.empty(each.shape)).abs().flatten().numpy() for each in parts]
    )
    for count in (1, 5_000, 27_000, len(values) + 1):
        value, _, _ = kth_largest([(each, 0) for each in parts], count)
        assert value == (np.sort(values)[-count] if count <= len(values) else 0.0)


def test_a_layer_that_is_merged_alone_has_the_same_bits_on_several_threads(entries_way, monkeypatch) -> None:
    experts = [random_factors(seed, 3, 37, 41) for seed in range(4)]
    methods = [partial(METHODS[name], experts, WEIGHTS, density=0.4) for name in ("ties", "ties_per_layer", "dare_linear")]
    before = [method().delta_OI for method in methods]
    monkeypatch.setattr(_entries, "ALONE", 100)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(method().delta_OI, wanted) for method, wanted in zip(methods, before, strict=True))
    finally:
        torch.set_num_threads(threads)
