"""Mix-of-Show's fusion beside numpy's least squares, and its regions beside attention written out."""

import math

import numpy as np
import pytest
import torch
from installed import needs_entry
from tiny_pipelines import PROMPTS, latents, pipeline, save_trained

import loraweave as lw
from loraweave.errors import CompositionError, LayerMismatch, WeightingError
from loraweave.extensions.diffusion import inputs_of, regions

pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
NAMES = ("one", "two")


def linear_alone(adapter):
    layers = {layer: part for layer, part in adapter.layers.items() if part.kind == "linear"}
    return lw.Adapter(adapter.name, adapter.base_model, layers, adapter.fingerprint)


@needs_entry("methods", "least_squares")
def test_fusion_is_the_least_squares_of_both_concepts_on_the_inputs_that_diffusers_gives_the_layers(tmp_path):
    pipe, theirs = pipeline("sd1"), pipeline("sd1")
    folders = [save_trained("sd1", tmp_path / name, seed, 2) for seed, name in enumerate(NAMES)]
    adapters = [linear_alone(lw.Adapter.from_pretrained(each, model=pipe)) for each in folders]
    layer = next(layer for layer in adapters[0].layers if layer.endswith("attn2.to_k"))
    statistics, inputs = [], []
    for adapter, prompt in zip(adapters, PROMPTS, strict=True):
        statistics.append(inputs_of(pipe, adapter, lambda prompt=prompt: latents(pipe, prompt)))
        theirs.unload_lora_weights()
        adapter.export(tmp_path / f"{adapter.name}-linear", target="diffusers")
        theirs.load_lora_weights(str(tmp_path / f"{adapter.name}-linear"))
        seen = []
        module = theirs.unet.get_submodule(layer.removeprefix("unet."))
        handle = module.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].flatten(0, 1)))
        latents(theirs, prompt)
        handle.remove()
        inputs.append(torch.cat(seen).double().numpy())
    fused = lw.merge(adapters, [1.0, 1.0], method="least_squares", statistics=statistics)
    stacked = np.concatenate([x / math.sqrt(len(x)) for x in inputs])
    wanted = [
        x / math.sqrt(len(x)) @ adapter.delta(layer).double().numpy().T for x, adapter in zip(inputs, adapters, strict=True)
    ]
    best = np.linalg.lstsq(stacked, np.concatenate(wanted), rcond=1e-6)[0]
    found = stacked @ fused.delta(layer).double().numpy().T
    assert np.abs(found - stacked @ best).max() < 1e-3 * np.abs(found).max()


BOXES = [(0.0, 0.0, 1.0, 0.5), (0.0, 0.25, 0.6, 1.0)]


def attended(attention, x_BTC, text_BSC):
    """What an attention of diffusers gives before its last layer, softmax written out."""
    q, k, v = attention.to_q(x_BTC), attention.to_k(text_BSC), attention.to_v(text_BSC)
    parts = [part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in (q, k, v)]
    scores = (parts[0] @ parts[1].transpose(2, 3) / math.sqrt(parts[0].shape[-1])).softmax(dim=-1)
    return (scores @ parts[2]).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_a_place_attends_to_the_mean_of_its_regions_and_to_the_pipelines_prompt_where_there_is_none():
    pipe = pipeline("sd1")
    attention = next(module for name, module in pipe.unet.named_modules() if name.endswith("down_blocks.1.attentions.0"))
    attention = attention.transformer_blocks[0].attn2
    seen = []
    with regions(pipe, list(zip(PROMPTS, BOXES, strict=True))):
        handle = attention.register_forward_hook(
            lambda m, args, kwargs, out: seen.append((args[0], kwargs, out)), with_kwargs=True
        )
        latents(pipe, "sea", steps=1)
        handle.remove()
    x_BTC, kwargs, found = seen[0]
    height = width = math.isqrt(x_BTC.shape[1])
    assert height > 1
    hidden = attended(attention, x_BTC, kwargs["encoder_hidden_states"]).unflatten(1, (height, width))
    total, count = torch.zeros_like(hidden), torch.zeros(height, width)
    for prompt, (top, left, bottom, right) in zip(PROMPTS, BOXES, strict=True):
        positive, negative = pipe.encode_prompt(prompt, pipe.device, 1, True)
        own = attended(attention, x_BTC, torch.cat([negative, positive])).unflatten(1, (height, width))
        rows = slice(math.ceil(top * height), math.floor(bottom * height))
        columns = slice(math.ceil(left * width), math.floor(right * width))
        total[:, rows, columns] += own[:, rows, columns]
        count[rows, columns] += 1
    assert set(count.flatten().tolist()) == {0.0, 1.0, 2.0}
    hidden = torch.where(count[..., None] == 0, hidden, total / count.clamp(min=1)[..., None]).flatten(1, 2)
    torch.testing.assert_close(found, attention.to_out[0](hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_one_region_over_all_of_the_image_is_that_prompt(kind, tmp_path):
    pipe = pipeline(kind)
    adapter = lw.Adapter.from_pretrained(save_trained(kind, tmp_path / "one", 1), model=pipe)
    engine, halves = lw.Composer(pipe, [adapter]), torch.zeros(2, 8, 8)
    halves[0, :4], halves[1, 4:] = 1, 1
    with engine.activate({"one": 1.0}):
        wanted, plain = latents(pipe, "red fox ink", images=2), latents(pipe, "sea", images=2)
        for places in ([(0.0, 0.0, 1.0, 1.0)], list(halves)):
            with regions(pipe, [("red fox ink", place) for place in places]):
                found = latents(pipe, "sea", images=2)
            # in XL the pooled text remains that of the pipeline's prompt
            if kind == "sd1":
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
            assert (found - plain).abs().max() > 1e-3
        assert torch.equal(latents(pipe, "sea", images=2), plain)


def test_wrong_regions_are_refused_by_name(tmp_path):
    pipe = pipeline("sd1")
    for where in ((0.0, 0.0, 1.5, 1.0), (0.5, 0.0, 0.5, 1.0), (0, 1), None):
        with pytest.raises(WeightingError, match="shares of the image"), regions(pipe, [("sea", where)]):
            pass
    with pytest.raises(WeightingError, match=r"a mask is .* not \(3,\)"), regions(pipe, [("sea", torch.ones(3))]):
        pass
    twice = regions(pipe, [("sea", BOXES[0])]), regions(pipe, [("ink", BOXES[1])])
    with twice[0], pytest.raises(CompositionError, match="regions already"), twice[1]:
        pass
    with pytest.raises(CompositionError, match="not for a FluxPipeline"), regions(pipeline("flux"), [("sea", BOXES[0])]):
        pass
    adapter = lw.Adapter.from_pretrained(save_trained("sd1", tmp_path / "one", 1), model=pipe)
    with pytest.raises(LayerMismatch, match="statistics are of linear layers"):
        inputs_of(pipe, adapter, lambda: latents(pipe))
    with pytest.raises(CompositionError, match="never ran"):
        inputs_of(pipe, linear_alone(adapter), lambda: None)
