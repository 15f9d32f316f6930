"""A learned number of experts a token: the formula at a site, what all sites share, and the terms of the loss."""

import math

import pytest
import torch

import loraweave as lw
from loraweave.errors import ScopeError, WeightingError

LAYER = "model.layers.1.mlp.up_proj"
BATCH = {
    "input_ids": torch.tensor([[3, 9, 27, 20, 41], [0, 0, 25, 3, 15]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
}


def mlp(made, x_I):
    """lambda(x) by the parameters that the model saves."""
    state = made.expert_state()
    width = len(x_I)
    first, last = (f"gates.reader.lambdas.{width}.{part}" for part in ("first", "last"))
    hidden = (state[f"{first}.weight"] @ x_I + state[f"{first}.bias"]).clamp(min=0)
    out = float(state[f"{last}.weight"][0] @ hidden + state[f"{last}.bias"])
    return 0.99 - math.log1p(math.exp(-out))


def projected(scores, lam):
    """The p of the simplex with the least |p - u|^2 - lambda |p|^2, by bisection for the tau of max(u - tau, 0)."""
    low, high = min(scores) - 2 - abs(lam), max(scores)
    for _ in range(200):
        tau = (low + high) / 2
        total = sum(max(u - tau, 0.0) for u in scores) / (1 - lam)
        low, high = (tau, high) if total > 1 else (low, tau)
    return [max(u - tau, 0.0) / (1 - lam) for u in scores]


def test_a_site_adds_its_formula(adds_up):
    seen = []

    def weights(made, row, x_TI, x_I):
        gate = made.gates[LAYER.replace(".", "/")]
        seen.append(projected((gate.r_EI @ x_I).tolist(), mlp(made, x_I)))
        return seen[-1]

    adds_up("ld_mole", LAYER, BATCH, weights, 2.0, rank=2, num_experts=5, hidden=6)
    assert len({sum(w > 0 for w in w_E) for w_E in seen}) > 1


def test_sites_of_one_width_share_an_mlp_and_all_of_it_learns(make_model):
    rows = [{"input_ids": [3 + i, 9, 5 + i, 6], "labels": [-100, -100, 5 + i, 6]} for i in range(4)]
    targets = ("q_proj", "up_proj", "down_proj")
    with lw.experts("ld_mole", make_model("llama"), rank=2, num_experts=3, hidden=8, target_modules=targets) as made:
        before = {name: value.clone() for name, value in made.expert_state().items()}
        assert sorted(made.gates["reader"].lambdas) == ["16", "24"]
        made.fit(rows, steps=4, batch_size=4, warmup=0, progress=False)
        same = [name for name, value in made.expert_state().items() if torch.equal(value, before[name])]
        assert not same


def test_the_terms_are_those_of_real_tokens(terms_of):
    options = {"rank": 2, "num_experts": 4, "hidden": 6, "target": 1, "target_modules": (LAYER,)}
    terms, notes = terms_of("ld_mole", BATCH, sparsity=0.5, balance=3.0, **options)
    real_BT = BATCH["attention_mask"].bool()
    (scores_BTE,), (w_BTE,), (lambda_BT1,) = notes.scores.values(), notes.weights.values(), notes.beside.values()
    shortfalls = []
    for u_E, lam in zip(scores_BTE[real_BT].tolist(), lambda_BT1[real_BT][:, 0].tolist(), strict=True):
        best, second = sorted(u_E, reverse=True)[:2]
        # the best alone has a share from here on
        shortfalls.append(max(1 - (best - second) - lam, 0.0))
    assert float(terms["sparsity"].detach()) == pytest.approx(0.5 * sum(shortfalls) / 8)
    w_NE = w_BTE[real_BT]
    counts_E = (w_NE > 0).sum(dim=0).double()
    expected = 3.0 * 4 * (counts_E / counts_E.sum() * w_NE.mean(dim=0)).sum()
    torch.testing.assert_close(terms["balance"], expected)


def test_saved_and_read_again_it_answers_and_generates_the_same(make_model, trained, tmp_path):
    base = make_model("llama")
    ids = torch.tensor([[3, 9, 27]])
    with trained(lw.experts("ld_mole", base, rank=2, num_experts=3, hidden=4)) as made:
        expected = made.generate(ids, max_new_tokens=4), made(ids).logits
        made.save_pretrained(tmp_path / "saved")
    with lw.experts(tmp_path / "saved", base) as again:
        assert torch.equal(again.generate(ids, max_new_tokens=4), expected[0])
        assert torch.equal(again(ids).logits, expected[1])


def test_one_adapter_of_the_whole_and_bad_options_are_refused(make_model):
    base = make_model("llama")
    with lw.experts("ld_mole", base) as made, pytest.raises(ScopeError, match="depend on the input"):
        made.adapter()
    with pytest.raises(WeightingError, match="target"):
        lw.experts("ld_mole", base, target=0)
