"""The four published meanings of TIES, each against a loop written from its definition."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from peft.utils import merge_utils
from tiny_models import random_factors as factors

from loraweave.composer.merge.methods.ties import ties
from loraweave.composer.merge.methods.ties_per_layer import ties_per_layer
from loraweave.extensions.methods.methods.ties_count import ties_count
from loraweave.extensions.methods.methods.ties_weighted import ties_weighted
from loraweave.types import Factors

pytestmark = pytest.mark.usefixtures("entries_way")

METHODS = [ties, ties_per_layer, ties_weighted, ties_count]
WEIGHTS = [0.7, -0.4, 1.3, 0.9]


def whole(matrix: list[list[float]]) -> Factors:
    """An update with exactly these entries: b is the identity."""
    a_RI = torch.tensor(matrix)
    return Factors(a_RI, torch.eye(a_RI.shape[0]))


def dense(update: Factors) -> torch.Tensor:
    return update.b_OR @ update.a_RI


def trimmed(values: list[float], count: int, equal: bool) -> list[float]:
    """The `count` largest magnitudes, of equal ones the earlier; with `equal`, all that equal the last one."""
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))
    keep = set(order[:count])
    if equal and count:
        keep |= {i for i in order if abs(values[i]) == abs(values[order[count - 1]])}
    return [value if i in keep else 0.0 for i, value in enumerate(values)]


def loop(
    rows: list[list[float]], weights: list[float], *, vote: str, divide: str, tie: float = 1.0, scale: float = 1.0
) -> list[float]:
    """Election and disjoint merge of trimmed updates, entry by entry, in double precision.

    `vote` is "weighted", "unweighted", "weighted count" or "unweighted count"; `divide` "count", "weights" or "nothing".
    """
    result = []
    for entries in zip(*rows, strict=True):
        votes = [w * t if vote.startswith("weighted") else t for w, t in zip(weights, entries, strict=True)]
        total = sum(math.copysign(1, v) if v else 0 for v in votes) if vote.endswith("count") else math.fsum(votes)
        sign = math.copysign(1, total) if total else tie
        agreeing = [(w, w * t) for w, t, v in zip(weights, entries, votes, strict=True) if v * sign > 0]
        divisor = {"count": len(agreeing), "weights": sum(w for w, _ in agreeing), "nothing": 1}[divide]
        result.append(scale * sum(x for _, x in agreeing) / (divisor or 1))
    return result


def check(found: torch.Tensor, expected: list[float]) -> None:
    assert torch.allclose(found.double().reshape(-1), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=1e-6)


def trimmed_layer(experts: list[Factors], density: float) -> list[list[float]]:
    rows = [dense(expert).flatten().tolist() for expert in experts]
    return [trimmed(row, int(density * len(row)), equal=False) for row in rows]


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (1, 9), (6, 1), (40, 3)])
def test_per_layer_is_peft_s_ties_on_the_dense_updates(density: float, shape: tuple[int, int]) -> None:
    experts = [factors(seed, 1 + seed, *shape) for seed in range(4)]
    for majority in ("total", "frequency"):
        with warnings.catch_warnings():
            # PEFT warns that a density of one prunes nothing
            warnings.simplefilter("ignore")
            expected = merge_utils.ties([dense(e) for e in experts], torch.tensor(WEIGHTS), density, majority)
        found = ties_per_layer(experts, WEIGHTS, density=density, majority=majority).delta_OI
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6, 1.0])
def test_per_layer_is_its_definition(density: float) -> None:
    experts = [factors(seed) for seed in range(4)]
    rows = trimmed_layer(experts, density)
    check(
        ties_per_layer(experts, WEIGHTS, density=density, scale=0.3).delta_OI,
        loop(rows, WEIGHTS, vote="unweighted", divide="count", scale=0.3),
    )
    check(
        ties_per_layer(experts, WEIGHTS, density=density, majority="frequency").delta_OI,
        loop(rows, WEIGHTS, vote="unweighted count", divide="count"),
    )


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("weights", [[0.7, 0.4, 1.3, 0.9], WEIGHTS])
def test_weighted_is_mergekit_s_definition(density: float, weights: list[float]) -> None:
    experts = [factors(seed) for seed in range(4)]
    rows = trimmed_layer(experts, density)
    for majority, vote in (("total", "weighted"), ("frequency", "weighted count")):
        check(
            ties_weighted(experts, weights, density=density, majority=majority, scale=1.5).delta_OI,
            loop(rows, weights, vote=vote, divide="weights", scale=1.5),
        )
        check(
            ties_weighted(experts, weights, density=density, majority=majority, normalize=False).delta_OI,
            loop(rows, weights, vote=vote, divide="nothing"),
        )


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6, 1.0])
def test_count_is_tara_s_definition(density: float) -> None:
    experts = [factors(seed) for seed in range(4)]
    rows = trimmed_layer(experts, density)
    for aggregate, divide in (("mean", "count"), ("sum", "nothing")):
        check(
            ties_count(experts, WEIGHTS, density=density, aggregate=aggregate, scale=0.3).delta_OI,
            loop(rows, WEIGHTS, vote="weighted count", divide=divide, scale=0.3),
        )


@pytest.mark.parametrize("density", [0.0, 0.2, 0.6, 0.97, 1.0])
def test_ties_trims_over_all_layers_at_once(density: float) -> None:
    # three layers of different size and magnitude; the second expert lacks the last one, which counts as zeros
    layers = [
        [factors(0), factors(1), factors(2)],
        [factors(3, 2, 4, 3), factors(4, 1, 4, 3), factors(5, 2, 4, 3)],
        [factors(6, 3, 2, 9), None, factors(7, 3, 2, 9)],
    ]
    weights = [0.7, -0.4, 1.3]
    sizes = [35, 12, 18]
    flat = [
        [x for layer, size in zip(layers, sizes, strict=True)
         for x in (dense(layer[e]).flatten().tolist() if layer[e] else [0.0] * size)]
        for e in range(3)
    ]  # fmt: skip
    rows = [trimmed(row, int(density * 65), equal=True) for row in flat]
    for aggregate, divide in (("mean", "count"), ("sum", "nothing")):
        expected = loop(rows, weights, vote="weighted", divide=divide, scale=0.3)
        survey = ties.survey(iter(layers), weights, density=density)
        found = [
            ties(layer, weights, density=density, aggregate=aggregate, scale=0.3, survey=survey).delta_OI.flatten()
            for layer in layers
        ]
        check(torch.cat(found), expected)


def test_ties_alone_takes_the_layer_for_the_model() -> None:
    experts = [factors(seed) for seed in range(4)]
    rows = [trimmed(dense(e).flatten().tolist(), 7, equal=True) for e in experts]
    check(ties(experts, WEIGHTS, density=0.2).delta_OI, loop(rows, WEIGHTS, vote="weighted", divide="count"))


def test_the_example_of_the_paper_by_hand() -> None:
    # of 5 entries at density 0.6, each expert keeps 3; the sums have signs + - + + -
    experts = [
        whole([[3.0, -1.0, 0.5, 0.0, 2.0]]),
        whole([[1.0, -3.0, 4.0, 0.0, -0.5]]),
        whole([[-2.0, 0.1, 0.0, 1.0, -5.0]]),
    ]
    expected = [2.0, -2.0, 4.0, 1.0, -5.0]
    found = ties(experts, [1.0, 1.0, 1.0], density=0.6).delta_OI
    assert found.tolist() == [expected]


def test_equal_magnitudes_are_all_kept_by_the_published_one_and_counted_by_the_others() -> None:
    even = whole([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, 1.0]])
    assert torch.equal(ties([even], [1.0], density=0.5).delta_OI, dense(even))
    first_four = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    for method in (ties_per_layer, ties_weighted, ties_count):
        assert torch.equal(method([even], [1.0], density=0.5).delta_OI, first_four)


def test_the_lower_index_wins_among_equal_magnitudes_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from loraweave.composer.merge.methods import _entries

    monkeypatch.setattr(_entries, "BLOCK", 16)
    generator = torch.Generator().manual_seed(3)
    update = Factors(torch.randint(-3, 4, (1, 5), generator=generator).float(), torch.ones(23, 1))
    for count in range(1, 115):
        density = (count + 0.5) / 115
        expected = trimmed(dense(update).flatten().tolist(), count, equal=False)
        assert ties_per_layer([update], [1.0], density=density).delta_OI.flatten().tolist() == expected


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_cancel_leave_the_positive_entries(method) -> None:
    # every sum is zero, so that the sign is 1, and the model's signs are balanced too
    update = factors(0)
    opposite = Factors(update.a_RI, -update.b_OR)
    found = method([update, opposite], [0.3, 0.3], density=1.0).delta_OI
    kept = dense(update).abs()
    assert torch.allclose(found, kept if method is ties_weighted else 0.3 * kept)


def test_a_sum_of_zero_takes_the_sign_of_most_entries_of_the_model() -> None:
    cancelling = [whole([[2.0, -2.0]]), whole([[-2.0, 2.0]])]
    negative = [whole([[-1.0, -1.0, 3.0]]), whole([[-1.0, -1.0, 3.0]])]
    for layers, expected in (([cancelling, negative], -2.0), ([cancelling], 2.0)):
        survey = ties.survey(layers, [1.0, 1.0], density=1.0)
        assert ties(cancelling, [1.0, 1.0], density=1.0, survey=survey).delta_OI.tolist() == [[expected, expected]]


@pytest.mark.parametrize("method", METHODS)
def test_a_single_expert_of_weight_one_at_density_one_is_given_back(method) -> None:
    update = whole(dense(factors(0)).tolist())
    assert torch.equal(method([update], [1.0], density=1.0).delta_OI, dense(update))


@pytest.mark.parametrize("method", METHODS)
def test_identical_experts_are_one_expert_in_the_mean(method) -> None:
    update = factors(0)
    one, three = method([update], [1.0], density=0.4), method([update] * 3, [1.0] * 3, density=0.4)
    assert torch.allclose(one.delta_OI, three.delta_OI)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_update_neither_votes_nor_counts(method) -> None:
    update, zero = factors(0), Factors(torch.zeros(0, 7), torch.zeros(5, 0))
    found = method([update, zero], [1.0, 1.0], density=0.4)
    assert torch.equal(found.delta_OI, method([update], [1.0], density=0.4).delta_OI)


@pytest.mark.parametrize("method", METHODS)
def test_a_bias_is_a_tensor_of_its_own_and_an_absent_one_zeros(method) -> None:
    bias = torch.tensor([4.0, -3.0, 2.0, -1.0, 0.5])
    with_bias, without = factors(0, bias_O=bias), factors(1)
    found = method([with_bias, without], [1.0, 1.0], density=0.6)
    if method is ties:
        # trimmed with the matrix, as one vector
        flat = [[*dense(with_bias).flatten().tolist(), *bias.tolist()], [*dense(without).flatten().tolist(), *[0.0] * 5]]
        rows = [trimmed(row, 24, equal=True) for row in flat]
        expected = loop(rows, [1.0, 1.0], vote="weighted", divide="count")
        check(torch.cat([found.delta_OI.flatten(), found.bias_O]), expected)
    else:
        assert found.bias_O.tolist() == [4.0, -3.0, 2.0, 0.0, 0.0]
    assert method([without], [1.0]).bias_O is None


def test_the_threshold_over_many_layers_is_exact_where_bit_patterns_crowd() -> None:
    # magnitudes that share their 16 high bits, so that only the second look tells them apart
    steps = torch.arange(64, dtype=torch.int32) * 7 + 0x3F800000
    values = steps.view(torch.float32)[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    layers = [[whole(values[:30].view(5, 6).tolist())], [whole(values[30:].view(2, 17).tolist())]]
    for count in (1, 2, 31, 63):
        survey = ties.survey(layers, [1.0], density=(count + 0.5) / 64)
        found = torch.cat([ties(layer, [1.0], survey=survey).delta_OI.flatten() for layer in layers])
        threshold = values.sort(descending=True).values[count - 1]
        assert torch.equal(found, torch.where(values >= threshold, values, 0.0))
