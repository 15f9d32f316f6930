"""Load and entropy: values known by hand, and what padding may not change."""

import math

import pytest
import torch

from loraweave.composer.live.recording import entropies, load
from loraweave.errors import ScopeError


@pytest.mark.parametrize("num_experts", [1, 2, 7, 1000])
def test_the_entropy_of_equal_weights_is_the_logarithm_of_their_number(num_experts):
    w_BTE = torch.full((3, 5, num_experts), -0.25)
    assert load(w_BTE).entropy == pytest.approx(math.log(num_experts), rel=1e-14, abs=0)


def test_the_entropy_of_one_expert_alone_is_zero():
    w_BTE = torch.zeros(1, 2, 3)
    w_BTE[0, 0, 1], w_BTE[0, 1, 2] = 0.3, -7.0
    assert load(w_BTE).entropy == 0.0
    assert not math.copysign(1, load(w_BTE).entropy) < 0


def test_entropy_is_that_of_the_formula():
    share = [0.7, 0.2, 0.1]
    expected = -sum(p * math.log(p) for p in share)
    assert float(entropies(torch.tensor([share], dtype=torch.float64) * -3)[0]) == pytest.approx(expected, rel=1e-14)


def test_tokens_without_weight_are_left_out_of_the_entropy_and_counted_in_the_choice():
    w_BTE = torch.tensor([[[0.5, 0.5], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]]])
    found = load(w_BTE)
    assert found.entropy == pytest.approx(math.log(2) / 2, rel=1e-14)
    assert found.chosen_E.tolist() == [0.5, 0.25]
    assert found.share_E.tolist() == [2.5 / 3, 0.5 / 3]
    assert found.num_tokens == 4


def test_without_any_weight_the_load_is_zero_and_the_entropy_is_unknown():
    for w_BTE, mask_BT in (
        (torch.zeros(2, 1, 3), None),
        (torch.ones(1, 2, 3), torch.zeros(1, 2)),
        (torch.ones(1, 2, 0), None),
    ):
        found = load(w_BTE, mask_BT)
        assert found.share_E.tolist() == found.chosen_E.tolist() == [0.0] * w_BTE.shape[2]
        assert math.isnan(found.entropy)


def test_padding_changes_nothing():
    w_BTE = torch.randn(2, 4, 3)
    mask_BT = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    alone = load(torch.cat([w_BTE[0, 2:], w_BTE[1, 1:]])[None])
    padded = load(w_BTE, mask_BT)
    assert torch.equal(padded.share_E, alone.share_E)
    assert torch.equal(padded.chosen_E, alone.chosen_E)
    assert (padded.entropy, padded.num_tokens) == (alone.entropy, 5)


def test_shared_axes_count_for_every_token_of_the_mask():
    mask_BT = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 0]])
    found = load(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), mask_BT)
    assert found.share_E.tolist() == [5 / 11, 6 / 11]
    assert found.chosen_E.tolist() == [5 / 8, 3 / 8]


@pytest.mark.parametrize("shape", [(3, 4), (2, 5)])
def test_a_mask_of_another_batch_is_named(shape):
    with pytest.raises(ScopeError, match=f"2 rows and 4 tokens do not fit .* {shape[0]} rows and {shape[1]} tokens"):
        load(torch.ones(2, 4, 3), torch.ones(shape))


def test_many_weights_are_looked_at_piece_by_piece(monkeypatch):
    w_BTE = torch.randn(3, 7, 5)
    whole = load(w_BTE)
    monkeypatch.setattr("loraweave.composer.live.recording.CHUNK", 11)
    pieces = load(w_BTE)
    assert torch.allclose(pieces.share_E, whole.share_E, rtol=1e-14)
    assert torch.equal(pieces.chosen_E, whole.chosen_E)
    assert pieces.entropy == pytest.approx(whole.entropy, rel=1e-14)
