"""The loads of used weights against their formula, with the mask of a call and without."""

import math

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.errors import ScopeError
from loraweave.extensions.explain.used import entropies, load_of, loads

IDS = torch.arange(3, 24).reshape(3, 7)


class ByInput:
    """A router whose weights are the first features of each token; keeps what it gave."""

    def __init__(self, num_experts=3):
        self.num_experts = num_experts
        self.given = {}

    def weights(self, x_BTI, layer):
        w_BTE = x_BTI[..., : self.num_experts].float()
        self.given.setdefault(layer, []).append(w_BTE)
        return w_BTE


@pytest.fixture
def alike(tiny_llama, make_adapter, tokenizer):
    """All experts update the same layers."""
    adapters = [make_adapter(tiny_llama, name, seed=seed) for seed, name in enumerate("abc")]
    return Composer(tiny_llama, adapters, tokenizer=tokenizer)


def run(engine, ids_BT=IDS, **more):
    with torch.no_grad():
        return engine.model(input_ids=ids_BT, **more)


def test_padding_counts_in_no_load(alike):
    ids_BT = IDS.clone()
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3], mask_BT[1, :5] = 0, 0
    router = ByInput()
    with alike.activate(router):
        run(alike, ids_BT, attention_mask=mask_BT)
    real = mask_BT.bool()
    for layer, its in loads(alike.last_weights, mask_BT).items():
        w_NE = router.given[layer][-1][real].double().abs()
        assert torch.allclose(its.share_E, w_NE.sum(dim=0) / w_NE.sum(), rtol=1e-12)
        share_NE = w_NE / w_NE.sum(dim=1, keepdim=True)
        assert its.entropy == pytest.approx(float(-(share_NE * share_NE.log()).sum(dim=1).mean()), rel=1e-12)
        assert its.num_tokens == 13


def test_a_mask_over_a_cache_and_a_head_on_the_last_token_fit(engine):
    mask_BT = torch.ones_like(IDS)
    mask_BT[0, :3] = 0
    with engine.activate({"c": 1.0}):
        run(engine, IDS, attention_mask=mask_BT, logits_to_keep=1)
    by_layer = loads(engine.last_weights, mask_BT)
    assert (by_layer["lm_head"].num_tokens, by_layer["model.layers.0.self_attn.q_proj"].num_tokens) == (3, 18)


def test_the_mask_of_another_batch_is_named(engine):
    with engine.activate({"c": 1.0}):
        run(engine)
    with pytest.raises(ScopeError, match="mask of 2 rows and 7 tokens does not fit a forward of 3 rows and 7 tokens"):
        loads(engine.last_weights, torch.ones(2, 7))


def test_beams_count_with_the_mixture_and_the_mask_of_their_text(alike):
    mask_BT = torch.ones_like(IDS)
    mask_BT[0, :3] = 0
    with alike.activate([{"a": 1.0}, {"b": 1.0}, None]), alike.record() as trace:
        alike.model.generate(input_ids=IDS, attention_mask=mask_BT, num_beams=2, max_new_tokens=1, do_sample=False)
    for its in loads(trace.weights, mask_BT).values():
        assert (its.num_tokens, its.chosen_E.tolist()) == (36, [8 / 36, 14 / 36])


@pytest.mark.parametrize("num_experts", [1, 2, 7, 1000])
def test_the_entropy_of_equal_weights_is_the_logarithm_of_their_number(num_experts):
    w_BTE = torch.full((3, 5, num_experts), -0.25)
    assert load_of(w_BTE).entropy == pytest.approx(math.log(num_experts), rel=1e-14, abs=0)


def test_the_entropy_of_one_expert_alone_is_zero():
    w_BTE = torch.zeros(1, 2, 3)
    w_BTE[0, 0, 1], w_BTE[0, 1, 2] = 0.3, -7.0
    assert load_of(w_BTE).entropy == 0.0
    assert not math.copysign(1, load_of(w_BTE).entropy) < 0


def test_entropy_is_that_of_the_formula():
    share = [0.7, 0.2, 0.1]
    expected = -sum(p * math.log(p) for p in share)
    assert float(entropies(torch.tensor([share], dtype=torch.float64) * -3)[0]) == pytest.approx(expected, rel=1e-14)


def test_tokens_without_weight_are_left_out_of_the_entropy_and_counted_in_the_choice():
    w_BTE = torch.tensor([[[0.5, 0.5], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]]])
    found = load_of(w_BTE)
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
        found = load_of(w_BTE, mask_BT)
        assert found.share_E.tolist() == found.chosen_E.tolist() == [0.0] * w_BTE.shape[2]
        assert math.isnan(found.entropy)


def test_padding_changes_nothing():
    w_BTE = torch.randn(2, 4, 3)
    mask_BT = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    alone = load_of(torch.cat([w_BTE[0, 2:], w_BTE[1, 1:]])[None])
    padded = load_of(w_BTE, mask_BT)
    assert torch.equal(padded.share_E, alone.share_E)
    assert torch.equal(padded.chosen_E, alone.chosen_E)
    assert (padded.entropy, padded.num_tokens) == (alone.entropy, 5)


def test_shared_axes_count_for_every_token_of_the_mask():
    mask_BT = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 0]])
    found = load_of(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), mask_BT)
    assert found.share_E.tolist() == [5 / 11, 6 / 11]
    assert found.chosen_E.tolist() == [5 / 8, 3 / 8]


@pytest.mark.parametrize("shape", [(3, 4), (2, 5)])
def test_a_mask_of_another_batch_is_named(shape):
    with pytest.raises(ScopeError, match=f"2 rows and 4 tokens do not fit .* {shape[0]} rows and {shape[1]} tokens"):
        load_of(torch.ones(2, 4, 3), torch.ones(shape))


def test_many_weights_are_looked_at_piece_by_piece(monkeypatch):
    w_BTE = torch.randn(3, 7, 5)
    whole = load_of(w_BTE)
    monkeypatch.setattr("loraweave.extensions.explain.used.CHUNK", 11)
    pieces = load_of(w_BTE)
    assert torch.allclose(pieces.share_E, whole.share_E, rtol=1e-14)
    assert torch.equal(pieces.chosen_E, whole.chosen_E)
    assert pieces.entropy == pytest.approx(whole.entropy, rel=1e-14)
