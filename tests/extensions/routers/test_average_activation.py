"""Average activations: what the layers saw, and PHATGOOSE's normalised products with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.errors import UnknownExpert, WeightingError
from loraweave.routers.tokens._saved import router

TEXTS = {"a": ["abc d", "Hello"], "b": ["0123"], "c": ["what is it?", "no"]}


@pytest.fixture
def fitted(engine):
    return router("average_activation", engine.pool).fit(engine, TEXTS, progress=False)


def test_a_mean_is_over_all_tokens_of_the_experts_own_texts_read_with_it(fitted, engine, model, tokenizer):
    layer = "model.layers.1.self_attn.q_proj"
    seen = []
    with torch.no_grad(), engine.activate({"a": 1.0}):
        handle = model.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for text in TEXTS["a"]:
            model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        handle.remove()
    tokens_NI = torch.cat([x[0] for x in seen])
    assert torch.allclose(fitted.means_[layer][engine.pool.places["a"]], tokens_NI.mean(dim=0), atol=1e-6)


def test_weights_are_a_softmax_over_the_two_nearest_standardised_means(fitted, engine):
    layer = "model.layers.1.self_attn.q_proj"
    x_BTI = torch.randn(1, 4, 16)
    present = fitted.members.layers[layer].experts

    def standardise(v):
        centred = v.double() - v.double().mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()

    scores_TE = standardise(x_BTI)[0] @ standardise(fitted.means_[layer]).T / 4
    found_TE = fitted.weights(x_BTI, layer)[0]
    for t in range(4):
        best = sorted(present, key=lambda place: -float(scores_TE[t, place]))[:2]
        powers = scores_TE[t, best].exp()
        expected_E = torch.zeros(len(fitted.experts), dtype=torch.float64)
        expected_E[best] = powers / powers.sum()
        assert torch.allclose(found_TE[t].double(), expected_E, atol=1e-5)


def test_one_experts_row_is_measured_without_touching_the_others(fitted, engine):
    before = {layer: fitted.means_[layer].clone() for layer in fitted.means_}
    fitted.fit(engine, {"b": ["something else"]}, progress=False)
    place = engine.pool.places["b"]
    others = [other for other in range(len(engine.pool)) if other != place]
    for layer, rows in before.items():
        assert torch.equal(fitted.means_[layer][others], rows[others])
    assert any(not torch.equal(fitted.means_[layer][place], rows[place]) for layer, rows in before.items())


def test_without_means_and_for_other_experts_it_is_refused_by_name(engine, model):
    empty = router("average_activation", engine.pool)
    with pytest.raises(WeightingError, match=r"knows no inputs of 'a', .*fit\(engine"), engine.activate(empty):
        model(torch.tensor([[4, 5]]))
    with pytest.raises(UnknownExpert, match="'z'"):
        empty.fit(engine, {"z": ["text"]}, progress=False)


def test_an_expert_that_joins_has_to_be_measured_before_it_is_weighed(fitted, engine, make_adapter):
    layer = fitted.layers[0]
    x_BTI = torch.randn(1, 2, fitted.members.layers[layer].num_inputs)
    fitted.weights(x_BTI, layer)
    new = make_adapter(engine.model, "new", rank=2, targets=(layer.rpartition(".")[2],), seed=9)
    with pytest.raises(WeightingError, match=f"knows no inputs of 'new' in layer '{layer}'"):
        fitted.add_expert("new", new).weights(x_BTI, layer)


def test_inputs_of_experts_that_need_their_base_are_measured_for_the_bound_ones(engine, model, tokenizer):
    dora = {
        layer: replace(part, magnitude_O=torch.linspace(0.5, 2, len(part.b_OR)))
        for layer, part in engine.pool["a"].layers.items()
    }
    unbound = Composer(model, engine.pool.including("a", replace(engine.pool["a"], layers=dora)), tokenizer=tokenizer)
    made = router("average_activation", unbound.bound_pool).fit(unbound, TEXTS, progress=False)
    with torch.no_grad(), unbound.activate(made):
        assert bool(model(torch.tensor([[5, 9, 11]])).logits.isfinite().all())
