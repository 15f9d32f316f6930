"""Collapse under probes: the formula, one text at a time on the dense update, and what is refused."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.errors import InvalidTask
from loraweave.extensions.explain.probes import probe

TASK = lw.Task([("a b", "c")], template="{input} =")
INPUTS = ("a b", "c d e", "f")


@torch.no_grad()
def collapse(model, tokenizer, adapter, texts, *, but=()):
    """max over v, `but` these, of the mean of p(v), a text at a time, on the model with the dense update added."""
    kept = {name: model.get_submodule(name).weight.clone() for name in adapter.layers}
    for name in adapter.layers:
        model.get_submodule(name).weight += adapter.delta(name).to(model.dtype)
    ids = [torch.tensor([tokenizer(f"{text} =")["input_ids"]]) for text in texts]
    p_NV = torch.cat([model(input_ids=each).logits[:, -1].double().softmax(dim=-1) for each in ids])
    for name, weight in kept.items():
        model.get_submodule(name).weight.copy_(weight)
    mean_V = p_NV.mean(dim=0)
    return max(float(p) for token, p in enumerate(mean_V) if token not in but)


def test_a_collapse_is_the_largest_mean_probability_of_one_first_token(model, tokenizer, make_adapter):
    adapter = make_adapter(model, "one")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = probe(model, tokenizer, adapter, TASK, INPUTS, probes=("z", "y x"))
    assert found.plain == pytest.approx(collapse(model, tokenizer, adapter, INPUTS), abs=1e-5)
    for word in ("z", "y x"):
        first, last = [f"{word} {text}" for text in INPUTS], [f"{text} {word}" for text in INPUTS]
        own = [tokenizer.convert_tokens_to_ids(word[0])]
        assert found.collapse[f"{word} ..."] == pytest.approx(collapse(model, tokenizer, adapter, first, but=own), abs=1e-5)
        assert found.collapse[f"... {word}"] == pytest.approx(collapse(model, tokenizer, adapter, last, but=own), abs=1e-5)
    values = sorted(found.collapse.values())
    assert found.rise == pytest.approx(values[3] - found.plain)
    assert found.gap == pytest.approx(values[3] - (values[1] + values[2]) / 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.own_models
def test_an_adapter_that_answers_with_the_probe_itself_has_not_collapsed(model, tokenizer, make_adapter):
    adapter, own = make_adapter(model, "one"), tokenizer.convert_tokens_to_ids("z")
    # a bias that makes z the answer to nearly everything
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    model.lm_head.bias[own] = 12.0
    texts = [f"z {text}" for text in INPUTS]
    assert collapse(model, tokenizer, adapter, texts) > 0.9
    found = probe(model, tokenizer, adapter, TASK, INPUTS, probes=["z"])
    assert found.collapse["z ..."] == pytest.approx(collapse(model, tokenizer, adapter, texts, but=[own]), abs=1e-5)
    assert found.collapse["z ..."] < 0.1


@pytest.mark.parametrize(
    ("inputs", "probes", "reason"),
    [(["a", "a"], ["z"], "1 different inputs and 1 probes"), (["a", "b"], [], "2 different inputs and 0 probes")],
)
def test_too_little_to_compare_is_refused(model, tokenizer, make_adapter, inputs, probes, reason):
    with pytest.raises(InvalidTask, match=reason):
        probe(model, tokenizer, make_adapter(model, "one"), TASK, inputs, probes=probes)
