"""Ternary streams: bit-exact, close to the entropy, and refused when damaged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.extensions.adapter_types.packings import compeft as ternary
from loraweave.extensions.adapter_types.packings.compeft import decode, encode, pack, split, unpack


def random_signs(size, density, seed=0):
    random = np.random.default_rng(seed)
    return ((random.random(size) < density) * random.choice([-1, 1], size)).astype(np.int8)


def bound_bits(signs):
    """n (H(k) + k): the positions of the share k of non-zeros, and a sign for each."""
    k = np.count_nonzero(signs) / len(signs)
    entropy = 0.0 if k in (0.0, 1.0) else -k * math.log2(k) - (1 - k) * math.log2(1 - k)
    return len(signs) * (entropy + k)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.382, 0.4, 0.45, 0.5, 0.7, 0.95])
def test_a_stream_is_within_five_percent_of_the_entropy_bound(density):
    signs = random_signs(200_000, density)
    stream = encode(signs)
    assert np.array_equal(decode(stream, len(signs)), signs)
    assert 1.0 - 1e-2 < 8 * len(stream) / bound_bits(signs) < 1.05


@given(hnp.arrays(np.int8, st.integers(0, 300), elements=st.integers(-1, 1)))
@settings(max_examples=200, deadline=None)
def test_what_is_decoded_is_what_was_encoded(signs):
    assert np.array_equal(decode(encode(signs), len(signs)), signs)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000])
@pytest.mark.parametrize("value", [-1, 0, 1])
def test_vectors_of_one_value_are_held(size, value):
    signs = np.full(size, value, np.int8)
    stream = encode(signs)
    assert np.array_equal(decode(stream, size), signs)
    assert len(stream) <= size // 8 + 8


def test_a_long_gap_and_a_single_entry_at_the_end_are_held():
    signs = np.zeros(1_000_003, np.int8)
    signs[-1] = -1
    assert np.array_equal(decode(encode(signs), len(signs)), signs)


def test_the_bits_are_those_that_the_docstring_describes():
    """By hand: places 2, 3, 9 of 10, so gaps 2, 0, 5; k = 1 makes 3 * 2 + (1 + 0 + 2) = 9 bits, k = 0 and 2 ten."""
    signs = np.array([0, 0, 1, -1, 0, 0, 0, 0, 0, 1], np.int8)
    remainders, quotients, positive = 0b100, 0b100110, 0b101
    assert encode(signs).tolist() == [1, 3, 6, remainders, quotients, positive]


@pytest.mark.parametrize("signs", [np.array([2], np.int8), np.array([1.0]), np.zeros((2, 2), np.int8)])
def test_other_values_and_shapes_are_refused(signs):
    with pytest.raises(AdapterUnsupported, match="vector of -1, 0 and 1"):
        encode(signs)


def test_a_vector_too_empty_to_be_read_back_is_not_written(monkeypatch):
    monkeypatch.setattr(ternary, "FREE_ENTRIES", 0)
    with pytest.raises(AdapterUnsupported, match="higher density"):
        encode(np.zeros(10**5, np.int8))


def test_a_few_bytes_that_claim_to_be_a_huge_vector_are_refused_before_memory_is_asked_for():
    with pytest.raises(AdapterCorrupt, match="cannot be"):
        decode(np.array([0, 0, 0], np.uint8), 2**45)
    with pytest.raises(AdapterCorrupt, match="cannot be"):
        decode(np.array([0, 0, 0], np.uint8), -1)


@pytest.mark.parametrize(
    "stream",
    [
        [],
        [0],
        [1, 3],
        [41, 1, 1, 1, 1],
        [0, 11, 11, 255, 7, 0, 0],
        [0, 2, 1, 1, 0],
        [40, 1, 200, 1, *[0] * 30],
        [1, 3, 6, 4, 38, 5, 0],
        [1, 3, 6, 4, 38],
        [1, 3, 6, 4, 6, 5],
        [1, 3, 6, 4, 22, 5],
        [1, 3, 6, 7, 52, 5],
        [1, 3, 6, 12, 38, 5],
        [1, 3, 6, 4, 38, 13],
        [0, *[255] * 12],
    ],
)
def test_damaged_streams_are_refused(stream):
    with pytest.raises(AdapterCorrupt, match="ternary stream is damaged"):
        decode(np.array(stream, np.uint8), 10)


@given(st.binary(max_size=40), st.integers(0, 200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_either_are_refused_or_are_what_an_encoder_could_have_written(data, size):
    stream = np.frombuffer(data, np.uint8)
    try:
        signs = decode(stream, size)
    except AdapterCorrupt:
        return
    assert signs.dtype == np.int8
    assert signs.shape == (size,)
    assert set(np.unique(signs)) <= {-1, 0, 1}


def test_a_changed_size_is_refused_or_changes_the_vector():
    signs = random_signs(500, 0.2)
    stream = encode(signs)
    with pytest.raises(AdapterCorrupt):
        decode(stream, int(np.flatnonzero(signs)[-1]))


def test_a_tensor_is_split_into_signs_and_a_scale_bit_for_bit():
    found = split(torch.tensor([[0.3, 0.0], [-0.3, 0.3]]))
    assert found is not None
    signs, c = found
    assert signs.tolist() == [1, 0, -1, 1]
    assert torch.tensor(c) == torch.tensor(0.3)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([0.3, 0.2]),
        torch.tensor([0.3, -0.0]),
        torch.tensor([1.0, 1.0 + 2**-23]),
        torch.tensor([torch.inf, 0.0]),
        torch.tensor([torch.nan]),
    ],
)
def test_a_tensor_that_would_not_come_back_bit_for_bit_is_not_ternary(tensor):
    assert split(tensor) is None
    with pytest.raises(AdapterUnsupported, match=r"'x'.*compeft\(adapter\) of .*methods"):
        pack([("layer 'x'", tensor)])


def test_tensors_come_back_bit_for_bit_with_one_scale_or_with_their_own():
    signs = [torch.from_numpy(random_signs(6, 0.6, seed)).float().reshape(2, 3) for seed in range(3)]
    signs[1].zero_()
    for scales, stored in (([0.37, 0.37, 0.37], 1), ([0.37, 1.0, 1e-7], 3)):
        given_tensors = [torch.where(s == 0, 0.0, s * c) for s, c in zip(signs, scales, strict=True)]
        packed = pack([(str(n), tensor) for n, tensor in enumerate(given_tensors)])
        assert len(packed["scales"]) == stored
        found = unpack(packed, [(2, 3)] * 3)
        assert all(
            torch.equal(one.view(torch.int32), two.view(torch.int32)) for one, two in zip(found, given_tensors, strict=True)
        )


def test_empty_tensors_and_none_at_all_are_held():
    packed = pack([("a", torch.zeros(0, 5)), ("b", torch.zeros(3, 0))])
    assert [tuple(tensor.shape) for tensor in unpack(packed, [(0, 5), (3, 0)])] == [(0, 5), (3, 0)]
    assert unpack(pack([]), []) == []


@pytest.mark.parametrize(
    "change",
    [
        {"scales": torch.tensor([0.5, 0.5, 0.5])},
        {"scales": torch.tensor([-0.5])},
        {"scales": torch.tensor([torch.nan])},
        {"scales": torch.tensor([0.5]).double()},
        {"signs": torch.tensor([1, 2], dtype=torch.int64)},
        {"signs": torch.zeros(2, 2, dtype=torch.uint8)},
    ],
)
def test_parts_that_do_not_fit_are_refused(change):
    packed = pack([("a", torch.tensor([0.5, 0.0])), ("b", torch.tensor([0.5]))])
    with pytest.raises(AdapterCorrupt):
        unpack({**packed, **change}, [(2,), (1,)])
