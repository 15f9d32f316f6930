"""One LoRA for each domain, of which every layer chooses one for a row."""

import pytest
import torch
from torch.nn import functional

import loraweave as lw
from loraweave.errors import ScopeError

DOMAINS = ("law", "games", "health")
LAYER = "model.layers.1.self_attn.v_proj"
# the second row is padded on the left
IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [0, 0, 25, 3, 15]])
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
LABELS_BT = torch.tensor([[-100, -100, 27, 20, 41], [-100, -100, -100, 3, 15]])


def test_a_site_adds_its_formula(adds_up):
    def chosen(made, row, x_TI, x_I):
        prompt = (slice(0, 2), slice(2, 3))[row]
        best = (made.gates[LAYER.replace(".", "/")].r_EI @ x_TI[prompt].mean(dim=0)).argmax()
        return functional.one_hot(best, 3)

    inputs = {"input_ids": IDS_BT, "attention_mask": MASK_BT, "labels": LABELS_BT}
    adds_up("mixture_of_loras", LAYER, inputs, chosen, 5.0 / 2, tasks=DOMAINS, rank=2, alpha=5.0)


def test_the_loss_is_the_sum_over_sites_of_the_cross_entropy_with_the_row_s_domain(make_model, trained):
    model = make_model("llama", dtype=torch.float64)
    inputs = {"input_ids": IDS_BT, "attention_mask": MASK_BT, "labels": LABELS_BT}
    with lw.experts("mixture_of_loras", model, tasks=DOMAINS, eta=0.7) as made:
        plain = trained(made)(**inputs).loss
        loss = made.train()(**inputs, task=["health", "law"]).loss
        expected = 0.0
        for scores_B1E in made.notes.scores.values():
            log_p_BE = functional.log_softmax(scores_B1E[:, 0], dim=-1)
            expected = expected - 0.7 * (log_p_BE[0, 2] + log_p_BE[1, 0]) / 2
        torch.testing.assert_close(made.terms["domain"], expected)
        # transformers has losses in fp32
        torch.testing.assert_close(loss.double(), plain + expected, rtol=1e-6, atol=0.0)


def test_a_row_without_a_domain_adds_nothing_to_the_loss(make_model, trained):
    inputs = {"input_ids": IDS_BT, "attention_mask": MASK_BT, "labels": LABELS_BT}
    with lw.experts("mixture_of_loras", make_model("llama"), tasks=DOMAINS) as made:
        trained(made).train()(**inputs, task=[-1, -1])
        assert float(made.terms["domain"].detach()) == 0.0
        made(**inputs, task=[-1, 1])
        of_one = made.terms["domain"].detach()
        made(input_ids=IDS_BT[1:], attention_mask=MASK_BT[1:], labels=LABELS_BT[1:], task="games")
        torch.testing.assert_close(of_one, made.terms["domain"].detach())


@pytest.mark.parametrize("domain", DOMAINS)
def test_with_oracle_a_domain_s_row_has_the_lora_of_that_domain(make_model, domain, trained):
    model = make_model("llama", dtype=torch.float64)
    inputs = {"input_ids": IDS_BT[:1]}
    with lw.experts("mixture_of_loras", model, tasks=DOMAINS, oracle=True) as made:
        own = trained(made)(**inputs, task=domain).logits
        adapter = made.expert(DOMAINS.index(domain))
    with lw.Composer(model, lw.ExpertPool([adapter])).activate({adapter.name: 1.0}):
        torch.testing.assert_close(model(**inputs).logits, own, rtol=1e-4, atol=1e-4)


def test_with_oracle_the_gates_choose_for_rows_of_no_domain(make_model, trained):
    inputs = {"input_ids": IDS_BT, "attention_mask": MASK_BT, "labels": LABELS_BT}
    with lw.experts("mixture_of_loras", make_model("llama"), tasks=DOMAINS, oracle=True) as made:
        trained(made).train()(**inputs, task=[-1, 1])
        for weights_B1E, scores_B1E in zip(made.notes.weights.values(), made.notes.scores.values(), strict=True):
            assert int(weights_B1E[0, 0].argmax()) == int(scores_B1E[0, 0].argmax())
            assert weights_B1E[1, 0].tolist() == [0.0, 1.0, 0.0]


def test_a_gate_learns_from_the_model_s_loss_by_the_gradient_of_its_softmax(make_model, trained):
    model = make_model("llama", dtype=torch.float64)
    with lw.experts("mixture_of_loras", model, tasks=DOMAINS, eta=0.0, target_modules=(LAYER,)) as made:
        trained(made).train()
        loss = made(input_ids=IDS_BT, attention_mask=MASK_BT, labels=LABELS_BT).loss
        ((w_B1E,), (scores_B1E,)) = made.notes.weights.values(), made.notes.scores.values()
        (of_w_B1E, of_scores_B1E) = torch.autograd.grad(loss, (w_B1E, scores_B1E))
        p_B1E = scores_B1E.softmax(dim=-1)
        expected_B1E = p_B1E * (of_w_B1E - (of_w_B1E * p_B1E).sum(dim=-1, keepdim=True))
        assert bool(of_scores_B1E.any())
        torch.testing.assert_close(of_scores_B1E, expected_B1E)


def test_a_model_with_an_encoder_and_a_decoder_is_refused(make_model):
    with (
        lw.experts("mixture_of_loras", make_model("t5"), tasks=DOMAINS, target_modules=("q",)) as made,
        pytest.raises(ScopeError, match="an encoder and a decoder, whose tokens differ: take a recipe with one gate"),
    ):
        made(input_ids=IDS_BT, labels=IDS_BT)


def test_a_site_that_sees_the_last_token_alone_is_refused(make_model):
    with lw.experts("mixture_of_loras", make_model("llama"), tasks=DOMAINS, target_modules=("lm_head",)) as made:
        assert made(input_ids=IDS_BT).logits.shape == (2, 5, 61)
        with pytest.raises(ScopeError, match="2 rows of 5 tokens, but its site sees 2 of 1: leave such layers out"):
            made.generate(input_ids=IDS_BT, attention_mask=MASK_BT, max_new_tokens=2)


def test_without_domains_there_is_one_expert_until_there_are_some(make_model):
    with lw.experts("mixture_of_loras", make_model("llama")) as made:
        assert {shape.num_experts for shape in made.shapes.values()} == {1}
        made.take_tasks(DOMAINS)
        assert {shape.num_experts for shape in made.shapes.values()} == {3}


def test_training_waits_for_a_site_to_choose_an_expert_again(make_model):
    rows = [{"input_ids": [5, 9, 7, 8], "labels": [-100, -100, 7, 8], "task": task} for task in DOMAINS[:2]]
    with lw.experts("mixture_of_loras", make_model("llama"), tasks=DOMAINS[:2], target_modules=("k_proj",)) as made:
        # the second step chooses experts whose b is still 0
        made.fit(rows, steps=4, batch_size=2, lr=1.0, warmup=0, progress=False)
        assert len(made.training_report.losses) == 4
