"""diffusers loads both of its layouts, `diffusers` and `kohya`, and makes the latents of the live mixture with them."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import latents, pipeline, save_trained
from torch import ones
from torch.testing import assert_close

import loraweave as lw
from loraweave.errors import AdapterUnsupported
from loraweave.types import Factors

pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
WEIGHTS = {"one": 0.7, "two": -0.5}
TARGETS = [("sd1", "kohya"), ("sdxl", "kohya"), *((kind, "diffusers") for kind in ("sd1", "sdxl", "sd3", "flux"))]


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """By kind: latents of the base, latents of the live mixture in all parts, the mixture as one adapter."""
    made = {}

    def of(kind):
        if kind not in made:
            folder, pipe = tmp_path_factory.mktemp(kind), pipeline(kind)
            trained = [save_trained(kind, folder / name, seed, 1 + seed) for seed, name in enumerate(WEIGHTS, 1)]
            adapters = [lw.Adapter.from_pretrained(each, model=pipe) for each in trained]
            with lw.Composer(pipe, adapters).activate(WEIGHTS):
                mixed = latents(pipe)
            made[kind] = latents(pipe), mixed, lw.merge(adapters, list(WEIGHTS.values()), method="linear")
        return made[kind]

    return of


@pytest.mark.parametrize(("kind", "target"), TARGETS)
def test_diffusers_makes_the_latents_of_the_live_mixture(mixtures, kind, target, tmp_path):
    plain, mixed, merged = mixtures(kind)
    report = merged.export(tmp_path / "out", target=target)
    made = pipeline(kind)
    made.load_lora_weights(str(report.folder))
    assert (mixed - plain).abs().max() > 0.05
    assert_close(latents(made), mixed, rtol=0, atol=1e-5 * max(1.0, float(mixed.abs().max())))


KOHYA = ("flux", "sd3")


def written_for_kohya(adapter, kind, folder):
    """(what is written, what is read back) of the layers of the adapter that kohya's layout has names for, T5's aside."""
    t5 = {"flux": "text_encoder_2.", "sd3": "text_encoder_3."}[kind]
    own = replace(adapter, layers={layer: part for layer, part in adapter.layers.items() if not layer.startswith(t5)})
    report = own.export(folder, target="kohya", base=pipeline(kind))
    return own, report.folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("kind", KOHYA)
def test_a_transformer_in_the_names_of_its_authors_is_read_back(mixtures, kind, tmp_path):
    merged, file = written_for_kohya(mixtures(kind)[2], kind, tmp_path / "out")
    joined = {"flux": "lora_unet_single_blocks_0_linear1", "sd3": "lora_unet_joint_blocks_1_context_block_attn_qkv"}[kind]
    assert f"{joined}.lora_up.weight" in load_file(file)
    again = lw.Adapter.from_pretrained(file, model=pipeline(kind))
    named = {layer.replace("text_model.", ""): layer for layer in again.layers}
    assert set(named) == {layer.replace("text_model.", "") for layer in merged.layers}
    for layer in merged.layers:
        assert_close(again.delta(named[layer.replace("text_model.", "")]), merged.delta(layer), rtol=1e-6, atol=1e-6)


def test_diffusers_reads_a_flux_file_of_kohyas_layout_and_makes_the_latents_of_the_live_mixture(mixtures, tmp_path):
    # diffusers divides linear1 of single blocks by the sizes of the real model, and passes over layers outside the blocks
    left_out = re.compile(r"\.proj_mlp|single.*\.to_[qkv]$|^transformer\.proj_out")
    layers = {layer: part for layer, part in mixtures("flux")[2].layers.items() if not left_out.search(layer)}
    merged, file = written_for_kohya(replace(mixtures("flux")[2], layers=layers), "flux", tmp_path / "out")
    live, made = pipeline("flux"), pipeline("flux")
    plain = latents(live)
    with lw.Composer(live, [merged]).activate({merged.name: 1.0}):
        mixed = latents(live)
    made.load_lora_weights(str(file))
    assert (mixed - plain).abs().max() > 0.05
    assert_close(latents(made), mixed, rtol=0, atol=1e-5 * max(1.0, float(mixed.abs().max())))


def test_diffusers_divides_the_joined_layers_of_a_real_sized_single_block_as_they_were(tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers as convert

    block = "transformer.single_transformer_blocks.3"
    sizes = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    layers = {f"{block}.{name}": Factors(torch.randn(2, 5), torch.randn(size, 2)) for name, size in sizes.items()}
    layers["transformer.norm_out.linear"] = Factors(torch.randn(2, 5), torch.randn(10, 2))
    report = lw.Adapter("a", "flux", layers).export(tmp_path / "out", target="kohya")
    read = convert(load_file(report.folder / "pytorch_lora_weights.safetensors"))
    for layer, factors in layers.items():
        path = layer if f"{layer}.lora_B.weight" in read else layer.removeprefix("transformer.")
        assert_close(read[f"{path}.lora_B.weight"] @ read[f"{path}.lora_A.weight"], factors.b_OR @ factors.a_RI)


class Zeros(dict):
    """A checkpoint whose other weights are zero."""

    def pop(self, key):
        return super().pop(key, torch.zeros(6, 1))


def test_the_updates_of_an_sd3_file_are_those_that_diffusers_makes_of_such_weights(mixtures, tmp_path):
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers as convert

    pipe = pipeline("sd3")
    ends = ("norm_out.linear", "norm1.linear", "norm1_context.linear", "ff.net.0.proj", "embedder.linear_1")
    modules = {f"transformer.{path}": module for path, module in pipe.transformer.named_modules() if path.endswith(ends)}
    layers = {
        path: Factors(torch.randn(2, module.in_features), torch.randn(module.out_features, 2))
        for path, module in modules.items()
    }
    merged = mixtures("sd3")[2]
    _, file = written_for_kohya(replace(merged, layers={**merged.layers, **layers}), "sd3", tmp_path / "out")
    stored, checkpoint = load_file(file), Zeros({"context_embedder.weight": torch.zeros(16, 1)})
    for name in [name for name in stored if name.startswith("lora_unet_") and name.endswith("up.weight")]:
        path = re.sub(r"_(\d+)_", r".\1.", name.removeprefix("lora_unet_").removesuffix(".lora_up.weight"))
        for word in ("x_block", "context_block", "attn", "mlp", "adaLN_modulation", "embedder", "final_layer"):
            path = re.sub(rf"(?<![a-z]){word}_(?!block)", f"{word}.", path)
        path = re.sub(r"_(\d)$", r".\1", path)
        checkpoint[f"{path}.weight"] = stored[name] @ stored[name.replace("lora_up", "lora_down")]
    of_authors, converted = dict(checkpoint), convert(checkpoint)
    assert len(of_authors) > 15
    # all of them were taken
    assert set(checkpoint) == set()
    for layer in {**merged.layers, **layers}:
        if layer.startswith("transformer."):
            want = layers[layer].b_OR @ layers[layer].a_RI if layer in layers else merged.delta(layer)
            assert_close(converted[f"{layer.removeprefix('transformer.')}.weight"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "target"), TARGETS)
def test_every_factor_is_in_the_file_and_read_back(mixtures, kind, target, tmp_path):
    merged = mixtures(kind)[2]
    report = merged.export(tmp_path / "out", target=target)
    stored = load_file(report.folder / "pytorch_lora_weights.safetensors")
    assert len(stored) == len(merged.layers) * (3 if target == "kohya" else 2)
    again = lw.Adapter.from_pretrained(report.folder)
    for layer, factors in merged.layers.items():
        own = layer if layer in again.layers else layer.replace("encoder.layers", "text_model.encoder.layers")
        assert_close(again.delta(own), merged.delta(layer), rtol=1e-6, atol=1e-6)
        assert again.layers[own].kernel == factors.kernel
    assert len(again.layers) == len(merged.layers)


REFUSED = {
    "a model without a name": (
        "diffusers",
        "transformer_blocks.0.attn.to_q",
        "begins with no part of a pipeline",
    ),
    "a transformer": ("kohya", "transformer.layers.0.attn.to_q", "is of a transformer, .*Flux and SD3.*target='diffusers'"),
    "a block of two models": ("kohya", "transformer.transformer_blocks.0.attn.to_q", "of Flux or of SD3, .*base=pipe"),
    "another proportion": ("kohya", "transformer.single_transformer_blocks.0.proj_mlp", "in the proportion 1 : 1 : 1 : 4"),
    "an unknown module": (
        "kohya",
        "unet.down_blocks.0.strange",
        "down_blocks_0_strange', which cannot be read back",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_has_no_name_in_the_layout_is_refused(case, tmp_path):
    target, layer, message = REFUSED[case]
    adapter = lw.Adapter("a", "tiny", {layer: Factors(ones(1, 3), ones(2, 1))})
    with pytest.raises(AdapterUnsupported, match=message):
        adapter.export(tmp_path / "out", target=target)
    assert list(tmp_path.iterdir()) == []


def test_layers_of_a_unet_alone_are_named_as_the_pipelines(tmp_path):
    layer = "mid_block.attentions.0.proj_in"
    adapter = lw.Adapter("a", "tiny", {layer: Factors(ones(1, 3), ones(2, 1))})
    report = adapter.export(tmp_path / "out", target="diffusers")
    stored = load_file(report.folder / "pytorch_lora_weights.safetensors")
    assert set(stored) == {f"unet.{layer}.lora_A.weight", f"unet.{layer}.lora_B.weight"}
