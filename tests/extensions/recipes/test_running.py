"""What the gates of a running call are told where a site runs twice, and where a model has an encoder and a decoder."""

import pytest
import torch

import loraweave as lw

IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [6, 2, 25, 3, 15]])


SITE = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def twice(make_model):
    """A model both of whose blocks are one and the same."""
    model = make_model("llama", dtype=torch.float64)
    model.model.layers[1] = model.model.layers[0]
    return model


def seen_at(made, site, **inputs):
    """(input, output) of a site in each of its runs in a call."""
    found = []
    module = made.base_model.get_submodule(site)
    with module.register_forward_hook(lambda _, args, y: found.append((args[0], y.clone()))):
        made(**inputs, use_cache=False)
    return found


def test_a_gate_of_rows_decides_in_each_run_of_a_site_by_what_it_sees_there(twice, trained):
    made = trained(lw.experts("fedms", twice, per_site=True, target_modules=("q_proj",)))
    r_EI, experts = made.gates[SITE.replace(".", "/")].r_EI, [made.expert(number).delta(SITE) for number in (0, 1)]
    runs = seen_at(made, SITE, input_ids=IDS_BT)
    weights = []
    for x_BTI, y_BTO in runs:
        w_BE = (x_BTI.mean(dim=1) @ r_EI.T).softmax(dim=-1)
        expected = x_BTI @ twice.get_submodule(SITE).weight.T
        for expert, delta_OI in enumerate(experts):
            expected = expected + w_BE[:, expert, None, None] * (x_BTI @ delta_OI.double().T)
        torch.testing.assert_close(y_BTO, expected, rtol=1e-5, atol=1e-6)
        weights.append(w_BE)
    assert len(runs) == 2
    assert (weights[0] - weights[1]).abs().max() > 1e-3


def test_what_it_decided_in_each_run_holds_for_the_answer(twice, trained):
    made = trained(lw.experts("fedms", twice, per_site=True, target_modules=("q_proj",)))
    labels = IDS_BT.masked_fill(torch.arange(5) < 3, -100)
    given = made(input_ids=IDS_BT, labels=labels, use_cache=False).logits
    settings = {"max_new_tokens": 2, "do_sample": False, "use_cache": False, "eos_token_id": None, "pad_token_id": 0}
    answer = made.generate(input_ids=IDS_BT[:, :3], output_logits=True, return_dict_in_generate=True, **settings)
    torch.testing.assert_close(answer.logits[0], given[:, 2].float())
    following = torch.cat([IDS_BT[:, :3], answer.sequences[:, 3:4]], dim=1)
    labels = following.masked_fill(torch.arange(4) < 3, -100)
    given = made(input_ids=following, labels=labels, use_cache=False).logits
    torch.testing.assert_close(answer.logits[1], given[:, 3].float())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_site_that_runs_twice_has_the_same_gradients_where_blocks_run_again(twice, trained):
    made = trained(lw.experts("fedms", twice, per_site=True, target_modules=("q_proj",))).train()
    gradients = []
    for again in (False, True):
        if again:
            made.gradient_checkpointing_enable()
        made.zero_grad()
        made(input_ids=IDS_BT, labels=IDS_BT.masked_fill(torch.arange(5) < 3, -100), use_cache=False).loss.backward()
        gradients.append({name: value.grad for name, value in made.expert_parameters().items()})
    torch.testing.assert_close(*gradients)


# of an encoder and a decoder, which have as many tokens
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


LABELS_BT = torch.tensor([[4, 8, -100, -100, -100], [5, 7, 11, 13, -100]])


def test_a_decoder_s_padding_is_no_part_of_an_expert_s_even_share(make_model, trained):
    options = {"num_experts": 4, "top_k": 1, "capacity": 1.0, "expert_dropout": 0.0, "target_modules": ("q", "v")}
    made = trained(lw.experts("sira", make_model("t5", dtype=torch.float64), **options)).train()
    # without the base's dropout
    made.base_model.eval()
    labels = LABELS_BT[:, :4].contiguous()
    few = made(input_ids=IDS_BT, attention_mask=MASK_BT, labels=labels).logits
    more = made(input_ids=IDS_BT, attention_mask=MASK_BT, labels=torch.nn.functional.pad(labels, (0, 9), value=-100)).logits
    torch.testing.assert_close(few[labels != -100], more[:, :4][labels != -100])
