"""What the gates of a running call are told where a site runs twice, and where a model has an encoder and a decoder."""

import pytest
import torch

import loraweave as lw
from loraweave.errors import ScopeError

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


def test_losses_are_of_every_run_of_a_site(twice, trained):
    made = trained(lw.experts("mixtral", twice, num_experts=3, top_k=1, balance=1.0, target_modules=("q_proj",))).train()
    r_EI = made.gates[SITE.replace(".", "/")].r_EI
    losses = []
    for x_BTI, _ in seen_at(made, SITE, input_ids=IDS_BT, labels=IDS_BT):
        p_NE = (x_BTI.flatten(0, 1) @ r_EI.T).softmax(dim=1)
        share_E = torch.nn.functional.one_hot(p_NE.argmax(dim=1), 3).double().mean(dim=0)
        losses.append(3 * (share_E * p_NE.mean(dim=0)).sum())
    assert len(losses) == 2
    torch.testing.assert_close(made.terms["balance"], torch.stack(losses).mean())


# of an encoder and a decoder, which have as many tokens
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
LABELS_BT = torch.tensor([[4, 8, -100, -100, -100], [5, 7, 11, 13, -100]])


@pytest.fixture
def on_t5(make_model, trained):
    made = lw.experts(
        "mixtral", make_model("t5", dtype=torch.float64), num_experts=3, top_k=1, balance=1.0, target_modules=("q", "v")
    )
    return trained(made).train()


def test_whose_tokens_a_layer_sees_has_to_be_told_by_their_number_where_padding_differs(on_t5):
    with pytest.raises(ScopeError, match=r"encoder has 5 tokens and the decoder 5, .* pad the labels with one more -100"):
        on_t5(input_ids=IDS_BT, attention_mask=MASK_BT, labels=LABELS_BT)
    one = torch.tensor([[4], [5]])
    with pytest.raises(ScopeError, match="encoder has 5 tokens and the decoder 1, "):
        on_t5(input_ids=IDS_BT, attention_mask=MASK_BT, labels=one)
    on_t5(input_ids=IDS_BT, labels=one)
    on_t5(input_ids=IDS_BT, labels=IDS_BT)


def test_losses_at_a_decoder_s_sites_are_of_its_own_real_tokens(on_t5):
    labels = torch.nn.functional.pad(LABELS_BT, (0, 1), value=-100)
    on_t5(input_ids=IDS_BT, attention_mask=MASK_BT, labels=labels)
    losses = []
    for site, scores_BTE in on_t5.notes.scores.items():
        # keys and values of a decoder's attention to the encoder are of the encoder's tokens
        of_encoder = site.startswith("encoder") or site.endswith("EncDecAttention.v")
        p_NE = scores_BTE[MASK_BT.bool() if of_encoder else labels != -100].softmax(dim=1)
        share_E = torch.nn.functional.one_hot(p_NE.argmax(dim=1), 3).double().mean(dim=0)
        losses.append(3 * (share_E * p_NE.mean(dim=0)).sum())
    assert len(losses) == 12
    torch.testing.assert_close(on_t5.terms["balance"], torch.stack(losses).mean())
