"""A frozen sparse projection that chooses the ranks: the formula at a site, what learns, and where its numbers lie."""

import math

import pytest
import torch

import loraweave as lw
from loraweave.errors import ScopeError, WeightingError

LAYER = "model.layers.1.mlp.up_proj"
BATCH = {"input_ids": torch.tensor([[3, 9, 27, 20, 41], [25, 3, 15, 7, 8]])}
ROWS = [{"input_ids": [3 + i, 9, 5 + i, 6], "labels": [-100, -100, 5 + i, 6]} for i in range(4)]


@pytest.mark.parametrize("by", ["magnitude", "value"])
def test_a_token_gets_the_ranks_of_the_largest_outputs_of_a(adds_up, by):
    def weights(made, row, x_TI, x_I):
        (site,), (gate,) = made.layers.values(), made.gates.values()
        biased_E = site.a_SI @ x_I + gate.bias_E
        best = (biased_E.abs() if by == "magnitude" else biased_E).topk(2).indices.tolist()
        return [1.0 if e in best else 0.0 for e in range(6)]

    adds_up("flylora", LAYER, BATCH, weights, 3.0 / 6, rank=6, top_k=2, alpha=3.0, by=by)


def test_rows_of_a_have_a_quarter_of_their_numbers_at_places_of_their_own(make_model):
    with lw.experts("flylora", make_model("llama"), rank=32, target_modules=(LAYER,)) as made:
        (site,) = made.layers.values()
        has_SI = site.a_SI != 0
        assert has_SI.sum(dim=1).tolist() == [16 // 4] * 32
        assert len({tuple(has_I.tolist()) for has_I in has_SI}) > 16
        # N(0, 1 / rank^2), and five standard deviations of that of 128 numbers
        assert float(site.a_SI[has_SI].std()) == pytest.approx(1 / 32, rel=5 / math.sqrt(2 * 128))


def test_b_learns_and_the_bias_moves_and_a_stays_the_same_bits(make_model):
    with lw.experts("flylora", make_model("llama"), rank=6, top_k=2, bias_rate=0.25, target_modules=(LAYER,)) as made:
        (site,), (gate,) = made.layers.values(), made.gates.values()
        a_SI = site.a_SI.clone()
        made.fit(ROWS, steps=1, batch_size=4, weight_decay=0.1, progress=False)
        assert torch.equal(site.a_SI, a_SI)
        assert site.b_SO.any()
        assert set(gate.bias_E.tolist()) <= {-0.25, 0.0, 0.25}
        assert gate.bias_E.any()


def test_saved_and_read_again_it_answers_the_same(make_model, trained, tmp_path):
    base = make_model("llama")
    with trained(lw.experts("flylora", base, rank=6, top_k=2, target_modules=(LAYER,))) as made:
        expected = made(**BATCH).logits
        made.save_pretrained(tmp_path / "saved")
    with lw.experts(tmp_path / "saved", base) as again:
        assert torch.equal(again(**BATCH).logits, expected)


def test_more_ranks_a_token_than_there_are_and_a_pool_are_refused(make_model, make_adapters):
    base = make_model("llama")
    with pytest.raises(WeightingError, match="top_k=9"):
        lw.experts("flylora", base, rank=8, top_k=9)
    with pytest.raises(ScopeError, match="cannot begin as adapters"):
        lw.experts("flylora", base, pool=make_adapters(base, "llama"))
