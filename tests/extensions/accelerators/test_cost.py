"""The choice between paths, where it is beyond doubt."""

from dataclasses import replace

import pytest

from loraweave.composer.live.kernels._parts import Choice, TokenWorkload, Workload, choose
from loraweave.composer.live.token_weights import _cheaper
from loraweave.extensions.accelerators.kernels.chosen_experts import choosing_pays, skipping_pays
from loraweave.extensions.accelerators.kernels.sorted_tokens import SortedTokens

# eight rows of 128 tokens, each with one adapter of rank 8 of its own
OWN = Workload(
    num_mixtures=8,
    tokens=128,
    largest=8,
    total=64,
    num_segments=8,
    distinct=64,
    stacked=64,
    num_inputs=576,
    num_outputs=576,
    itemsize=4,
)


def test_rows_with_adapters_of_their_own_are_gathered():
    assert choose(OWN).path == "gathered"
    assert choose(replace(OWN, tokens=1)).path == "gathered"


def test_one_mixture_for_all_rows_is_one_pair_of_products():
    one = replace(OWN, num_mixtures=1, tokens=1024, total=8, num_segments=1, distinct=8, stacked=8)
    assert choose(one).path == "shared"


def test_ranks_beyond_a_full_matrix_are_multiplied_out():
    one = replace(OWN, num_mixtures=1, tokens=1024, largest=800, total=800, num_segments=1, distinct=800, stacked=800)
    assert choose(one).path == "merged"


def test_long_rows_of_very_different_ranks_are_segments():
    uneven = replace(OWN, tokens=4096, largest=512, total=512 + 7 * 4, distinct=540, stacked=540)
    assert choose(uneven).path == "segments"


def test_a_few_tokens_in_half_precision_are_multiplied_in_single_on_a_cpu_only():
    short = replace(OWN, tokens=1, itemsize=2)
    assert choose(short) == Choice("gathered", exact=True)
    assert not choose(replace(short, device="cuda")).exact


@pytest.mark.parametrize(
    ("num_tokens", "per_token", "num_experts", "pays"),
    [
        # measured on one core in fp32: times of all experts for all tokens over those of tokens sorted by expert
        (1024, 1, 16, True),  # 4.4
        (1024, 2, 64, True),  # 7.1
        (1024, 4, 256, True),  # 11.1
        (8, 1, 128, True),  # 3.7
        (8, 4, 32, False),  # 0.47
        (8, 2, 16, False),  # 0.55
        (64, 4, 16, False),  # 0.84
    ],
)
def test_tokens_are_sorted_by_expert_where_that_was_measured_to_pay(num_tokens, per_token, num_experts, pays):
    work = TokenWorkload(num_tokens, num_tokens * per_token, num_experts, num_experts * 8, 576, 1536, itemsize=4)
    assert (_cheaper(work) is SortedTokens) == pays


def test_tokens_that_use_every_expert_are_not_sorted():
    assert _cheaper(TokenWorkload(1024, 1024 * 20, 20, 160, 576, 1536, itemsize=4)) is None


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "rank", "pays"),
    [(512, 8, 8, False), (512, 8, 32, True), (512, 32, 8, False), (512, 32, 16, True), (8, 32, 16, False)],
)
def test_trained_experts_meet_their_own_tokens_alone_where_all_have_many_rank_rows(num_tokens, num_experts, rank, pays):
    work = TokenWorkload(num_tokens, num_tokens * 2, num_experts, num_experts * rank, 576, 576, itemsize=4)
    assert choosing_pays(work, learns=True) == pays


# two small ones of three leave next to nothing out, and six of eight are many calls
@pytest.mark.parametrize(
    ("most", "num_experts", "rank", "pays"), [(2, 8, 8, True), (2, 4, 64, True), (2, 3, 2, False), (6, 8, 8, False)]
)
def test_one_token_leaves_experts_out_where_their_bytes_take_longer_than_calls_of_its_own(most, num_experts, rank, pays):
    assert skipping_pays(most, num_experts, num_bytes=4 * num_experts * rank * (576 + 576)) == pays
