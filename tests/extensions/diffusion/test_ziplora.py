"""ZipLoRA beside its formula, with dense updates in the weights of another pipeline."""

import pytest
import torch
from tiny_pipelines import PROMPTS, latents, pipeline, save_trained
from torch.func import functional_call

import loraweave as lw
from loraweave.errors import CompositionError, WeightingError
from loraweave.extensions.diffusion import zip_lora

pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
OF = dict(zip(("content", "style"), PROMPTS, strict=True))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(pipeline, its two adapters, what each is for)."""
    pipe, folder = pipeline("sd1"), tmp_path_factory.mktemp("trained")
    trained = [save_trained("sd1", folder / name, seed, rank=seed + 1) for seed, name in enumerate(OF)]
    return pipe, *(lw.Adapter.from_pretrained(each, model=pipe) for each in trained), lambda name: latents(pipe, OF[name])


@pytest.fixture(scope="module")
def learned(parts):
    return zip_lora(*parts, steps=12, learning_rate=0.05, progress=False)


def merger(adapter, whole, layer):
    """m of one of the two adapters, and how far its columns are from being multiples of the adapter's own."""
    own, first = adapter.layers[layer], whole.layers[layer]
    place = 0 if adapter.name == "content" else -own.rank
    part_RI = first.a_RI[place:][: own.rank]
    m_I = (part_RI * own.a_RI).sum(dim=0) / (own.a_RI**2).sum(dim=0)
    return m_I, float((part_RI - own.a_RI * m_I).abs().max())


def test_each_input_of_a_layer_has_one_weight_for_each_adapter_and_the_rest_is_the_sum(parts, learned):
    _, content, style, _ = parts
    layer, conv, text = (
        next(layer for layer in learned.layers if layer.startswith(start) and layer.endswith(end))
        for start, end in (("unet", "to_q"), ("unet", "conv1"), ("text_encoder", "fc1"))
    )
    for adapter in (content, style):
        m_I, rest = merger(adapter, learned, layer)
        assert rest < 1e-5
        assert float((m_I - 1).abs().max()) > 0.1
    for summed in (conv, text):
        torch.testing.assert_close(learned.delta(summed), content.delta(summed) + style.delta(summed))


def test_the_terms_are_those_of_dense_updates_in_the_weights(parts, learned):
    pipe, content, style, run = parts
    plain = lw.merge([content, style], [1.0, 1.0], method="linear")
    linear = [layer for layer, part in learned.layers.items() if layer.startswith("unet") and part.kind == "linear"]
    mergers = [[merger(adapter, learned, layer)[0] for adapter in (content, style)] for layer in linear]
    overlap = sum(float((m_I * other_I).abs().mean()) for m_I, other_I in mergers)
    # in the plain sum every m is 1
    assert learned.card["zip_lora"]["overlap"] == pytest.approx([len(linear), overlap], rel=1e-4)
    for place, whole in enumerate((plain, learned)):
        for adapter in (content, style):
            expected = error(pipe, adapter, whole, run)
            assert learned.card["zip_lora"][adapter.name][place] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def error(pipe, adapter, whole, run):
    """The mean squared difference of what the unet predicts under `whole` and under `adapter`, on the adapter's calls."""
    calls = []

    def saw(module, args, kwargs, output):
        calls.append((args, {name: value for name, value in kwargs.items() if value is not None}, output[0].clone()))

    handle = pipe.unet.register_forward_hook(saw, with_kwargs=True)
    with lw.Composer(pipe, [adapter]).activate({adapter.name: 1.0}):
        run(adapter.name)
    handle.remove()
    weights = {}
    for layer in whole.layers:
        if layer.startswith("unet."):
            path = f"{layer.removeprefix('unet.')}.weight"
            weight = pipe.unet.get_parameter(path)
            weights[path] = weight + whole.delta(layer).reshape(weight.shape)
    predicted = [functional_call(pipe.unet, weights, args, kwargs)[0] for args, kwargs, _ in calls]
    return sum(float(((made - call[2]) ** 2).mean()) for made, call in zip(predicted, calls, strict=True)) / len(calls)


def test_learning_brings_both_predictions_nearer_and_the_weights_apart(learned):
    terms = learned.card["zip_lora"]
    for before, after in (terms["content"], terms["style"], terms["overlap"]):
        assert after < before


def test_the_pipeline_is_as_it_was_and_runs_the_merged_adapter(parts, learned):
    pipe, *_ = parts
    fresh = pipeline("sd1")
    assert torch.equal(latents(pipe), latents(fresh))
    with lw.Composer(pipe, [learned]).activate({learned.name: 1.0}):
        assert not torch.equal(latents(pipe), latents(fresh))
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


def test_wrong_calls_say_what_to_do(parts):
    pipe, content, style, run = parts
    with pytest.raises(WeightingError, match="both are named 'content'"):
        zip_lora(pipe, content, content, run)
    with pytest.raises(CompositionError, match=r"run\('content'\) called none of unet"):
        zip_lora(pipe, content, style, lambda name: None)
    with pytest.raises(WeightingError, match=r"learning_rate=0"):
        zip_lora(pipe, content, style, run, learning_rate=0)
