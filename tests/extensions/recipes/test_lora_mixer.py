"""Experts of the attention: what counts in training and after it, the terms of the loss, and labelled rows."""

import math

import pytest
import torch

import loraweave as lw
from loraweave.errors import WeightingError
from loraweave.extensions.recipes import with_options

LAYER = "model.layers.1.self_attn.o_proj"
BATCH = {
    "input_ids": torch.tensor([[3, 9, 27, 20, 41], [0, 0, 25, 3, 15]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
}


@pytest.mark.parametrize("training", [False, True])
def test_a_token_has_the_best_experts_and_in_training_all(seen_at, training):
    seen = seen_at("lora_mixer", LAYER, training=training, rank=2, num_experts=5, top_k=2)
    for x_I, y0_O, y_O in zip(seen.x_TI, seen.y0_TO, seen.y_TO, strict=True):
        s_E = (seen.gate.r_EI @ x_I).tolist()
        kept = sorted(s_E)[-(5 if training else 2) :]
        total = sum(math.exp(s) for s in kept)
        expected_O = y0_O
        for s, a_RI, b_RO in zip(s_E, seen.a_ERI, seen.b_ERO, strict=True):
            if s in kept:
                # alpha is twice the rank
                expected_O = expected_O + 2.0 * math.exp(s) / total * (b_RO.T @ (a_RI @ x_I))
        torch.testing.assert_close(y_O, expected_O)


def test_the_terms_balance_the_experts_and_sharpen_each_token(terms_of):
    options = {"rank": 2, "num_experts": 4, "top_k": 2, "target_modules": (LAYER,)}
    terms, notes = terms_of("lora_mixer", BATCH, balance=0.5, entropy=0.25, **options)
    (scores_BTE,) = notes.scores.values()
    terms = {name: float(term.detach()) for name, term in terms.items()}
    rows = scores_BTE[BATCH["attention_mask"].bool()].softmax(dim=1).tolist()
    counts, entropies = [0] * 4, []
    for p_E in rows:
        for e in sorted(range(4), key=lambda e: -p_E[e])[:2]:
            counts[e] += 1
        entropies.append(-sum(p * math.log(p) for p in p_E))
    overlap = sum(counts[e] / sum(counts) * sum(p_E[e] for p_E in rows) / len(rows) for e in range(4))
    assert terms["balance"] == pytest.approx(0.5 * overlap)
    assert terms["entropy"] == pytest.approx(0.25 * sum(entropies) / len(entropies))


def test_with_hard_a_row_teaches_the_expert_of_its_task_alone_and_then_the_gates_learn(make_model):
    rows = [{"input_ids": [3, 9, 5, 6], "labels": [-100, -100, 5, 6], "task": "second"}]
    options = {"rank": 2, "num_experts": 3, "top_k": 1, "tasks": ("first", "second"), "target_modules": (LAYER,)}
    made = lw.experts("lora_mixer", make_model("llama"), hard=True, **options)
    made.fit(rows, steps=3, batch_size=1, warmup=0, progress=False)
    (layer,) = made.layers.values()
    assert [bool(b_RO.any()) for _, b_RO in layer.starts()] == [False, True, False]
    made = with_options(made, hard=False)
    (gate,) = made.gates.values()
    before = gate.r_EI.clone()
    assert made.fit(rows, steps=3, batch_size=1, warmup=0, progress=False).training_report.terms.keys() == {
        "balance",
        "entropy",
    }
    assert not torch.equal(gate.r_EI, before)


def test_numbers_that_do_not_fit_are_refused(make_model):
    base = make_model("llama")
    with pytest.raises(WeightingError, match="top_k=3"):
        lw.experts("lora_mixer", base, num_experts=2)
    with pytest.raises(WeightingError, match="num_experts=3"):
        lw.experts("lora_mixer", base, num_experts=3, hard=True, tasks=("a", "b", "c", "d"))
