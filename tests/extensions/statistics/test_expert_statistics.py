"""Statistics of adapters on fused experts, and the merge methods that read them, held to autograd and numpy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_families import FAMILIES, WARNINGS, both, make, near, save_families

from loraweave.composer.composer import Composer
from loraweave.composer.merge.merge import merge
from loraweave.extensions.statistics import Statistics, collecting

pytestmark = WARNINGS

TEXTS = ["a dog", "two birds sing", "x", "Once upon a time"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_families(tmp_path_factory)


def draw_by_place(logits, mask_BT, draws):
    """The gradient of log p for labels that do not depend on the model: the ids 3, 4, 5, .. by position."""
    found = -logits.float().softmax(dim=-1) * mask_BT[..., None]
    for row, place in mask_BT.nonzero().tolist():
        found[row, place, 3 + place] += 1.0
    return found


def reference(model, adapter, tokenizer):
    """{layer: (Gram matrix of what its experts' module reads, Fisher)} with the updates in the weights, by autograd."""
    modules, grams, squares = dict(model.named_modules()), {}, {}
    parts = {layer: layer.rsplit(".", 2) for layer in adapter.layers if ".experts." in layer}
    turned = {layer: type(modules[parts[layer][0]]).__name__ == "Llama4TextExperts" for layer in parts}
    with torch.no_grad():
        for layer in adapter.layers:
            if layer not in parts:
                modules[layer].weight += adapter.delta(layer)
                continue
            path, parameter, number = parts[layer]
            weight = getattr(modules[path], parameter)[int(number)]
            # of gpt-oss peft knows that the sides are turned, of Llama 4 it does not
            delta = adapter.delta(layer)
            weight += delta.T if type(modules[path]).__name__ == "GptOssExperts" else delta

    def saw(path, module, args):
        given = args[0].detach().flatten(0, -2)
        for layer, (own, parameter, number) in parts.items():
            if own == path and parameter == "gate_up_proj":
                if len(args) == 1:
                    x = given.unflatten(0, (5, -1))[int(number)]
                else:
                    x = given[(args[1] == int(number)).any(dim=-1)]
                grams[layer] = grams.get(layer, 0) + x.T @ x / sum(map(len, TEXTS))

    handles = [
        modules[path].register_forward_pre_hook(lambda m, args, path=path: saw(path, m, args))
        for path in {path for path, _, _ in parts.values()}
    ]
    for text in TEXTS:
        model.zero_grad()
        log_p = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits.log_softmax(dim=-1)
        sum(log_p[0, place, 3 + place] for place in range(log_p.shape[1])).backward()
        for layer, (path, parameter, number) in parts.items():
            grad = getattr(modules[path], parameter).grad[int(number)]
            grad = grad.T if type(modules[path]).__name__ == "GptOssExperts" else grad
            squares[layer] = squares.get(layer, 0) + grad**2 / len(TEXTS)
    for handle in handles:
        handle.remove()
    return grams, squares, turned


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_experts_are_those_of_the_dense_model_text_by_text(family, saved, tokenizer, monkeypatch):
    monkeypatch.setattr(collecting, "_drawn_gradient", draw_by_place)
    _, ours = saved(family)
    model = make(family)
    grams, squares, turned = reference(make(family), ours["a"], tokenizer)
    for size in (1, 3):
        found = collecting.collect_statistics(model, tokenizer, ours["a"], TEXTS, batch_size=size, progress=False).layers
        assert set(found) == set(ours["a"].layers)
        assert set(grams) < set(squares)
        for layer, gram in grams.items():
            near(found[layer].gram_II, gram)
        for layer, square in squares.items():
            near(found[layer].fisher_OI, square)
        assert {found[layer].turned for layer in turned} == {family == "llama4_text"}
        assert {found[layer].num_tokens for layer in turned} == {sum(map(len, TEXTS))}
    assert not any("forward" in vars(module) for module in model.modules())
    # an adapter without these experts saw what those that have them are merged with
    plain = replace(ours["a"], layers={layer: part for layer, part in ours["a"].layers.items() if layer not in turned})
    beside = collecting.collect_statistics(model, tokenizer, plain, TEXTS, what="gram", layers=list(turned), progress=False)
    assert all(beside.layers[layer].gram_II.shape == found[layer].gram_II.shape for layer in turned)


@both
def test_methods_that_weigh_by_data_merge_experts(family, saved, tokenizer, tmp_path):
    _, ours = saved(family)
    pair, weights = list(ours.values()), [0.7, 0.3]
    seen = [
        collecting.collect_statistics(make(family), tokenizer, each, texts, layers=list(ours["a"].layers), progress=False)
        for each, texts in zip(pair, (TEXTS[:2], TEXTS[2:]), strict=True)
    ]
    seen = [Statistics.load(each.save(tmp_path / f"{number}")) for number, each in enumerate(seen)]
    made = {
        name: merge(pair, weights, method=name, statistics=seen, rank=None)
        for name in ("regmean", "fisher", "least_squares")
    }
    for layer in made["regmean"].layers:
        turned = family == "llama4_text" and ".experts." in layer
        deltas = [each.delta(layer).double() if layer in each.layers else 0 * pair[0].delta(layer).double() for each in pair]
        fishers = [each.layers[layer].fisher_OI.double() * weight for each, weight in zip(seen, weights, strict=True)]
        # below that a floor counts
        reached = torch.stack(fishers).amin(dim=0) > 1e-5
        mean = sum(f * d for f, d in zip(fishers, deltas, strict=True)) / sum(fishers)
        torch.testing.assert_close(made["fisher"].delta(layer).double()[reached], mean[reached], atol=1e-3, rtol=1e-3)
        deltas = [delta.T if turned else delta for delta in deltas]
        grams = [each.layers[layer].gram_II.double() * weight for each, weight in zip(seen, weights, strict=True)]
        wanted = sum(d @ g for d, g in zip(deltas, grams, strict=True)) @ torch.linalg.pinv(sum(grams), rtol=1e-6)
        found = made["least_squares"].delta(layer).double()
        values, vectors = torch.linalg.eigh(sum(grams))
        roots = vectors * values.clamp(min=0).sqrt()
        torch.testing.assert_close((found.T if turned else found) @ roots, wanted @ roots, atol=1e-4, rtol=1e-3)
    with Composer(make(family), [made["regmean"]]).activate({made["regmean"].name: 1.0}):
        pass
