"""Laplace-LoRA beside a dense posterior: Jacobians by finite differences of adapters, whole Kronecker products in numpy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.model.scoring import label_scores
from loraweave.errors import AdapterUnsupported, CompositionError, InvalidTask, LoraweaveError, UnknownExpert
from loraweave.extensions.rewards.posterior import laplace

TASK = lw.Task([("a b", "x"), ("b c a", "y z"), ("c", "x")], template="{input}", labels=["x", "y z"])
ASKED = ["a c", "b"]
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")


@pytest.fixture
def engine(make_model, make_adapters, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    whole = make_adapters(model, "llama")[0]
    double = {layer: (whole.layers[layer].a_RI.double(), whole.layers[layer].b_OR.double()) for layer in LAYERS}
    own = {layer: replace(whole.layers[layer], a_RI=a_RI, b_OR=b_OR) for layer, (a_RI, b_OR) in double.items()}
    return Composer(model, [replace(whole, layers=own)], tokenizer=tokenizer)


def vector(adapter):
    parts = [each for layer in sorted(adapter.layers) for each in (adapter.layers[layer].a_RI, adapter.layers[layer].b_OR)]
    return torch.cat([part.double().flatten() for part in parts]).numpy()


def moved(adapter, step_P):
    """The adapter with its entries moved."""
    layers, start = {}, 0
    for layer in sorted(adapter.layers):
        own = adapter.layers[layer]
        found = {}
        for name in ("a_RI", "b_OR"):
            part = getattr(own, name)
            found[name] = part.double() + torch.from_numpy(step_P[start : start + part.numel()]).view(part.shape)
            start += part.numel()
        layers[layer] = replace(own, **found)
    return replace(adapter, layers=layers)


@torch.no_grad()
def scores(engine, adapter, inputs):
    """log p_NL by the ranking of labels, of another code path than the posterior's."""
    other = Composer(engine.model, [adapter], tokenizer=engine.tokenizer)
    with other.activate({adapter.name: 1.0}):
        return label_scores(engine.model, engine.tokenizer, [TASK.prompt(text) for text in inputs], TASK.labels).numpy()


def jacobian(engine, adapter, inputs, eps=2.0**-10):
    """(N, L, P) of log p, which is that of f less what all labels of an input share."""
    num = len(vector(adapter))
    rows = []
    for place in range(num):
        step = np.zeros(num)
        step[place] = eps
        ahead, behind = (scores(engine, moved(adapter, s), inputs) for s in (step, -step))
        rows.append((ahead - behind) / (2 * eps))
    return np.stack(rows, axis=-1)


def test_the_covariance_of_scores_is_that_of_the_dense_posterior(engine):
    adapter = next(iter(engine.pool.adapters.values()))
    found = laplace(engine, adapter.name, TASK, prior=0.7, progress=False)
    precision = np.zeros((len(vector(adapter)),) * 2)
    start = 0
    for layer in sorted(adapter.layers):
        for block in found.parts[layer]:
            size = len(block.in_I) * len(block.out_O)
            inner = (block.in_II * block.in_I) @ block.in_II.T
            outer = (block.out_OO * block.out_O) @ block.out_OO.T
            precision[start : start + size, start : start + size] = np.kron(outer.numpy(), inner.numpy())
            start += size
    covariance = np.linalg.inv(precision + 0.7 * np.eye(len(precision)))
    j_NLP = jacobian(engine, adapter, ASKED)
    expected = j_NLP @ covariance @ j_NLP.transpose(0, 2, 1)
    _, own = found.scores(engine.tokenizer, ASKED)
    # log p has no part that all labels share: with C the projection onto sums of 0 under p
    p_NL = np.exp(scores(engine, adapter, ASKED))
    centre = np.eye(2) - p_NL[:, None, :]
    assert np.allclose(centre @ own.numpy() @ centre.transpose(0, 2, 1), expected, rtol=2e-3, atol=1e-8)
    assert expected.max() > 1e-3


def test_the_kronecker_factors_are_means_and_sums_over_the_tokens_of_all_rows(engine):
    adapter = next(iter(engine.pool.adapters.values()))
    found = laplace(engine, adapter.name, TASK, prior=1.0, progress=False)
    layer = LAYERS[1]
    module, own = dict(engine.model.named_modules())[layer], adapter.layers[layer]
    p_NL = np.exp(scores(engine, adapter, [asked for asked, _ in TASK.examples]))
    xs, gs, vs = [], [], []
    for number, (asked, _) in enumerate(TASK.examples):
        for place, label in enumerate(TASK.labels):
            prompt = engine.tokenizer(asked)["input_ids"]
            answer = engine.tokenizer(f" {label}{engine.tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
            kept = []
            handle = module.register_forward_hook(lambda m, args, out, kept=kept: kept.append((args[0], out)))
            embedded = engine.model.get_input_embeddings()(torch.tensor([prompt + answer])).detach().requires_grad_()
            with engine.activate({adapter.name: 1.0}):
                log_p = engine.model(inputs_embeds=embedded).logits[0].log_softmax(dim=-1)
                f = sum(log_p[len(prompt) - 1 + n, token] for n, token in enumerate(answer))
                (g,) = torch.autograd.grad(f, kept[0][1])
            handle.remove()
            xs.append(kept[0][0][0].detach())
            gs.append(g[0])
            vs += [p_NL[number, place] * (1 - p_NL[number, place])] * len(prompt + answer)
    x_KI, g_KO, v_K = torch.cat(xs), torch.cat(gs), torch.tensor(vs)
    z_KR, h_KR = x_KI @ own.a_RI.T, g_KO @ own.b_OR
    for block, (given, taken) in zip(found.parts[layer], ((x_KI, h_KR), (z_KR, g_KO)), strict=True):
        inner, outer = (block.in_II * block.in_I) @ block.in_II.T, (block.out_OO * block.out_O) @ block.out_OO.T
        assert torch.allclose(inner, given.T @ given / len(given), atol=1e-9)
        assert torch.allclose(outer, (taken * v_K[:, None]).T @ taken, atol=1e-9)


def test_the_prior_is_the_one_of_the_highest_marginal_likelihood(engine):
    adapter = next(iter(engine.pool.adapters.values()))
    found = laplace(engine, adapter.name, TASK, progress=False)
    curvature = torch.cat([block.curvature().flatten() for pair in found.parts.values() for block in pair]).numpy()
    log_p = scores(engine, adapter, [asked for asked, _ in TASK.examples])
    likelihood = sum(log_p[n, TASK.labels.index(target)] for n, (_, target) in enumerate(TASK.examples))

    def evidence(prior):
        return likelihood - 0.5 * (np.log1p(curvature / prior).sum() + prior * (vector(adapter) ** 2).sum())

    assert found.log_evidence == pytest.approx(evidence(found.prior), abs=1e-6)
    assert all(evidence(found.prior * factor) < found.log_evidence for factor in (0.9, 1.1))


def test_predictions_are_mean_softmaxes_of_draws_with_that_covariance(engine):
    name = next(iter(engine.pool.adapters))
    found = laplace(engine, name, TASK, prior=0.05, progress=False)
    mean_NL, covariance_NLL = found.scores(engine.tokenizer, ASKED)
    said = found.predict(ASKED, samples=20000, seed=1, progress=False)
    difference_SN = said.members_MBV[..., 0] - said.members_MBV[..., 1]
    expected = covariance_NLL[:, 0, 0] + covariance_NLL[:, 1, 1] - 2 * covariance_NLL[:, 0, 1]
    assert torch.allclose(difference_SN.var(dim=0), expected, rtol=0.05)
    error = float(expected.max() / 20000) ** 0.5
    assert torch.allclose(difference_SN.mean(dim=0), mean_NL[:, 0] - mean_NL[:, 1], atol=4 * error)
    assert said.outcomes == ("x", "y z")
    assert torch.equal(said.probabilities, found.predict(ASKED, samples=20000, seed=1, progress=False).probabilities)


def test_drawn_adapters_vary_as_the_posterior_says(engine):
    name = next(iter(engine.pool.adapters))
    found = laplace(engine, name, TASK, prior=3.0, progress=False)
    drawn = found.draw(400, seed=2)
    assert [adapter.name for adapter in drawn[:2]] == [f"{name}~1", f"{name}~2"]
    for layer, (of_a, of_b) in found.parts.items():
        for part, block in (("a_RI", of_a), ("b_OR", of_b)):
            draws = torch.stack([getattr(adapter.layers[layer], part) for adapter in drawn])
            turned = block.out_OO.T @ (draws - getattr(engine.pool[name].layers[layer], part)) @ block.in_II
            ratio = turned.square().mean(dim=0) * (block.curvature() + 3.0)
            # five standard deviations of the mean of so many squares
            assert ratio.mean() == pytest.approx(1.0, abs=5 * math.sqrt(2 / (400 * ratio.numel())))
            assert float(ratio.min()) > 0.6
            assert float(ratio.max()) < 1.5


def test_what_has_no_posterior_is_refused_by_name(engine, tokenizer):
    name, adapter = next(iter(engine.pool.adapters.items()))
    with pytest.raises(InvalidTask, match="labels on its examples"):
        laplace(engine, name, lw.Task([("a", "b")]))
    with pytest.raises(UnknownExpert, match="'nobody'"):
        laplace(engine, "nobody", TASK)
    with pytest.raises(LoraweaveError, match="prior=0"):
        laplace(engine, name, TASK, prior=0.0)
    with pytest.raises(CompositionError, match="tokenizer="):
        laplace(Composer(engine.model, engine.pool), name, TASK)
    layer, own = next(iter(adapter.layers.items()))
    biased = replace(adapter, layers={layer: replace(own, bias_O=torch.ones(len(own.b_OR)))})
    with pytest.raises(AdapterUnsupported, match=layer):
        laplace(Composer(engine.model, [biased], tokenizer=tokenizer), name, TASK)
