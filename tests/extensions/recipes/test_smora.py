"""Every rank an expert: the formula at a site, and the loss that keeps the ranks busy."""

import json
import math

import pytest
import torch
from transformers import TrainerCallback

import loraweave as lw
from loraweave.composer.experts.together import train_experts
from loraweave.errors import TrainingError, WeightingError
from loraweave.extensions.recipes.recipes.smora import Smora

LAYER = "model.layers.1.mlp.up_proj"
BATCH = {
    "input_ids": torch.tensor([[3, 9, 27, 20, 41], [0, 0, 25, 3, 15]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
}


def test_a_site_adds_the_released_formula(adds_up):
    def weights(made, row, x_TI, x_I):
        (gate,) = made.gates.values()
        # the bias counts in the weights, too
        assert gate.bias_E.all()
        values = [
            1 / (1 + math.exp(-score)) + bias
            for score, bias in zip((gate.r_EI @ x_I).tolist(), gate.bias_E.tolist(), strict=True)
        ]
        best = sorted(range(6), key=lambda e: -values[e])[:2]
        whole = sum(values[e] for e in best)
        return [2 * values[e] / whole if e in best else 0.0 for e in range(6)]

    adds_up("smora", LAYER, BATCH, weights, 3.0 / 2, rank=6, top_k=2, alpha=3.0)


def test_its_sizes_are_the_released_ones():
    """Rank 64, of which a token uses 8, alpha 16 and a bias that moves by 1e-5."""
    recipe = Smora()
    assert (recipe.rank, recipe.top_k, recipe.scale, recipe.bias_rate) == (64, 8, 16 / 8, 1e-5)


def test_softmax_adds_what_it_added_before(adds_up):
    def weights(made, row, x_TI, x_I):
        (gate,) = made.gates.values()
        p_E = (gate.r_EI @ x_I).softmax(dim=0).tolist()
        biased_E = (gate.r_EI @ x_I + gate.bias_E).tolist()
        best = sorted(range(6), key=lambda e: -biased_E[e])[:2]
        return [p_E[e] if e in best else 0.0 for e in range(6)]

    adds_up("smora", LAYER, BATCH, weights, 3.0 / 6, rank=6, top_k=2, alpha=3.0, by="softmax")


def test_a_folder_from_before_the_released_formula_answers_as_it_did(make_model, trained, tmp_path):
    base, options = make_model("llama"), {"rank": 6, "top_k": 2, "target_modules": (LAYER,)}
    with trained(lw.experts("smora", base, by="softmax", **options)) as made:
        expected = made(**BATCH).logits
        made.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "experts.json"
    said = json.loads(file.read_text())
    assert said["options"].pop("by") == "softmax"
    file.write_text(json.dumps(said))
    with lw.experts(tmp_path / "saved", base) as again:
        assert again.recipe.by == "softmax"
        assert torch.equal(again(**BATCH).logits, expected)
    with (
        lw.experts("smora", base, **options) as made,
        pytest.raises(WeightingError, match="with by 'softmax', but this model has 'sigmoid'"),
    ):
        made.load(tmp_path / "saved")


def test_each_step_moves_the_bias_against_the_ranks_that_more_tokens_than_the_mean_chose(make_model):
    rows = [{"input_ids": [3, 9, 27, 20, 41], "labels": [-100, -100, 27, 20, 41]}, {"input_ids": [25, 3, 15]}]
    rows[1]["labels"] = rows[1]["input_ids"]
    with lw.experts("smora", make_model("llama"), rank=6, top_k=2, bias_rate=0.5, target_modules=(LAYER,)) as made:
        (gate,) = made.gates.values()
        inputs = []
        module = made.base_model.get_submodule(LAYER)
        handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        made.fit(rows, steps=2, batch_size=2, lr=1e-9, progress=False, gradient_accumulation=2)
        handle.remove()
        # two passes a step, each of one row, the shorter first and without padding
        bias_E = torch.zeros(6)
        for step in (inputs[:2], inputs[2:]):
            counts_E = torch.zeros(6)
            for x_I in torch.cat([x_BTI[0] for x_BTI in step]):
                counts_E[((gate.r_EI @ x_I).sigmoid() + bias_E).topk(2).indices] += 1
            assert counts_E.sum() == 2 * (5 + 3)
            bias_E = bias_E + 0.5 * torch.sign(counts_E.mean() - counts_E)
        assert torch.equal(gate.bias_E, bias_E)
        assert bias_E.any()


def test_an_interrupted_training_goes_on_with_the_bias_it_had(make_model, tmp_path):
    rows = [{"input_ids": [3 + i, 9, 5 + i, 6], "labels": [-100, -100, 5 + i, 6]} for i in range(7)]
    options = {"rank": 6, "top_k": 2, "bias_rate": 0.1, "target_modules": (LAYER,)}

    def fit(stops=None, **settings):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step == stops:
                    raise KeyboardInterrupt

        made = lw.experts("smora", make_model("llama"), **options)
        return made.fit(rows, steps=4, batch_size=2, progress=False, callbacks=[Stop()], **settings)

    whole = fit().expert_state()
    with pytest.raises(KeyboardInterrupt):
        fit(3, checkpoint=tmp_path, checkpoint_every=2)
    again = fit(checkpoint=tmp_path, checkpoint_every=2).expert_state()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert any("bias_E" in name and value.any() for name, value in whole.items())


def test_a_bias_that_moves_shares_no_pass_with_other_jobs(make_model, tokenizer):
    base = make_model("llama")
    with (
        lw.experts("smora", base, rank=6, top_k=2, target_modules=(LAYER,)) as made,
        pytest.raises(TrainingError, match="bias_rate=0"),
    ):
        train_experts(base, tokenizer, {"job": (made, [("a", "b")])})


def test_its_ranks_are_rows_of_one_lora(make_model):
    with lw.experts("smora", make_model("llama"), rank=5, top_k=2, target_modules=(LAYER,)) as made:
        (site,) = made.layers.values()
        assert (tuple(site.a_SI.shape), tuple(site.b_SO.shape)) == ((5, 16), (5, 24))
        assert made.expert(3).rank == 1


def test_its_balance_is_that_of_the_ranks_of_real_tokens(terms_of):
    terms, notes = terms_of("smora", BATCH, rank=4, top_k=2, balance=0.5, target_modules=(LAYER,))
    (scores_BTE,) = notes.scores.values()
    p_NE = scores_BTE[BATCH["attention_mask"].bool()].softmax(dim=1)
    counts_E = torch.zeros(4, dtype=torch.float64)
    for p_E in p_NE:
        counts_E[p_E.topk(2).indices] += 1
    torch.testing.assert_close(terms["balance"], 0.5 * 4 * (counts_E / len(p_NE) * p_NE.mean(dim=0)).sum())


def test_more_ranks_a_token_than_there_are_is_refused(make_model):
    with pytest.raises(WeightingError, match="top_k=9"):
        lw.experts("smora", make_model("llama"), rank=8, top_k=9)
