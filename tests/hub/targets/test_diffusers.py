"""diffusers loads both of its layouts, `diffusers` and `kohya`, and makes the latents of the live mixture with them."""

import pytest
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
# kohya's layout has no names of a transformer that diffusers reads exactly
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
    "a transformer": ("kohya", "transformer.transformer_blocks.0.attn.to_q", "is of a transformer, .*target='diffusers'"),
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
