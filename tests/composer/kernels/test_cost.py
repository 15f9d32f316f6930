"""The choice between paths, where it is beyond doubt."""

from __future__ import annotations

from dataclasses import replace

from loraweave.composer.kernels._cost import Choice, Workload, choose

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


def test_rows_with_adapters_of_their_own_are_gathered() -> None:
    assert choose(OWN).path == "gathered"
    assert choose(replace(OWN, tokens=1)).path == "gathered"


def test_one_mixture_for_all_rows_is_one_pair_of_products() -> None:
    one = replace(OWN, num_mixtures=1, tokens=1024, total=8, num_segments=1, distinct=8, stacked=8)
    assert choose(one).path == "shared"


def test_ranks_beyond_a_full_matrix_are_multiplied_out() -> None:
    one = replace(OWN, num_mixtures=1, tokens=1024, largest=800, total=800, num_segments=1, distinct=800, stacked=800)
    assert choose(one).path == "merged"


def test_long_rows_of_very_different_ranks_are_segments() -> None:
    uneven = replace(OWN, tokens=4096, largest=512, total=512 + 7 * 4, distinct=540, stacked=540)
    assert choose(uneven).path == "segments"


def test_a_few_tokens_in_half_precision_are_multiplied_in_single_on_a_cpu_only() -> None:
    short = replace(OWN, tokens=1, itemsize=2)
    assert choose(short) == Choice("gathered", exact=True)
    assert not choose(replace(short, device="cuda")).exact


def test_triton_takes_rows_of_different_ranks_by_token_and_by_segment_where_it_runs() -> None:
    decode = replace(OWN, num_mixtures=32, tokens=1, largest=64, total=312, num_segments=32, distinct=312, stacked=312)
    on_gpu = replace(decode, itemsize=2, device="cuda", triton=True)
    wide = replace(on_gpu, num_inputs=4096, num_outputs=4096)
    assert choose(wide).path == "triton_gathered"
    assert choose(replace(wide, tokens=128)).path == "triton_segments"
    assert not choose(replace(wide, triton=False)).path.startswith("triton")
    # two calls of a library are less than two launches where that is all there is to do
    assert choose(replace(on_gpu, num_mixtures=2, largest=8, total=16, num_segments=2)).path == "gathered"
