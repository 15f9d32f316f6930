"""The page of the extension."""

import torch


def test_the_code_of_the_page_runs(run_page):
    names = run_page("docs/extensions/statistics.md")
    layer = "model.layers.0.self_attn.q_proj"
    deltas = [adapter.delta(layer).double() for adapter in names["adapters"]]
    fishers = [seen.layers[layer].fisher_OI.double().clamp(min=1e-6) for seen in names["fisher"]]
    expected = sum(f * d for f, d in zip(fishers, deltas, strict=True)) / sum(fishers)
    assert (names["mean"].delta(layer).double() - expected).norm() <= 1e-5 * expected.norm()
    loaded = names["Statistics"].load("passive.safetensors")
    assert torch.equal(loaded.layers[layer].fisher_OI, names["fisher"][0].layers[layer].fisher_OI)
