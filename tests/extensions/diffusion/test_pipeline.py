"""A diffusers pipeline under a Composer: diffusers' own adapters on an equal pipeline are the other side of every number."""

import dataclasses
from pathlib import Path

import pytest
import torch
from installed import needs_entry
from tiny_pipelines import PROMPTS, latents, pipeline, save_trained

import loraweave as lw
from loraweave.errors import (
    BaseModelMismatch,
    BaseModelUnverified,
    CompositionError,
    LayerMismatch,
    ScopeError,
    WeightingError,
)
from loraweave.extensions.diffusion import Composite, composite, k_lora, switch

pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
MIXTURE = {"one": 0.7, "two": -0.5}
KINDS = ["sd1", "sdxl", "sd3", "flux"]


class Both:
    """Two equal pipelines with the same two adapters: `theirs` by diffusers, `ours` beside an `engine`."""

    def __init__(self, kind: str, folder: Path) -> None:
        folders = [save_trained(kind, folder / name, seed, rank) for name, seed, rank in (("one", 1, 2), ("two", 2, 3))]
        self.kind, self.theirs, self.ours = kind, pipeline(kind), pipeline(kind)
        self.base = latents(self.ours, PROMPTS)
        for each in folders:
            self.theirs.load_lora_weights(str(each), adapter_name=each.name)
        self.adapters = [lw.Adapter.from_pretrained(each, model=self.ours) for each in folders]
        self.engine = lw.Composer(self.ours, self.adapters)
        self.denoiser = "unet" if kind.startswith("sd1") or kind == "sdxl" else "transformer"

    def of(self, mixture, *prompts, **given):
        with self.engine.activate(mixture):
            return latents(self.ours, *prompts, **given)

    def of_theirs(self, mixture, *prompts, **given):
        self.theirs.set_adapters(list(mixture), list(mixture.values()))
        return latents(self.theirs, *prompts, **given)


@pytest.fixture(scope="module")
def both(request, tmp_path_factory):
    return Both(request.param, tmp_path_factory.mktemp("trained"))


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


all_kinds = pytest.mark.parametrize("both", KINDS, indirect=True, scope="module")
sd1 = pytest.mark.parametrize("both", ["sd1"], indirect=True, scope="module")


@all_kinds
class TestEveryLayout:
    def test_a_mixture_in_all_parts_gives_the_latents_of_diffusers_and_leaves_the_bits_of_the_base(self, both):
        found = both.of(MIXTURE)
        assert (found - both.base[:1]).abs().max() > 0.05
        near(found, both.of_theirs(MIXTURE))
        with both.engine.fused(MIXTURE):
            near(latents(both.ours), found)
        assert torch.equal(latents(both.ours, PROMPTS), both.base)

    def test_each_prompt_of_a_batch_has_its_own_mixture_under_guidance_too(self, both):
        rows = [MIXTURE, {"two": 1.0}]
        found = both.of(rows, PROMPTS, images=2)
        for number, (row, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
            # the noise of the same places of the batch
            others = [prompt if place == number else PROMPTS[0] for place in range(2)]
            near(found[2 * number : 2 * number + 2], both.of_theirs(row, others, images=2)[2 * number : 2 * number + 2])
        near(both.of([None, MIXTURE], PROMPTS)[:1], both.base[:1])

    def test_switch_gives_the_latents_of_adapters_that_diffusers_sets_between_steps(self, both):
        def turn(pipe, step, timestep, given):
            pipe.set_adapters(["one", "two"][(step + 1) // 2 % 2])
            return {}

        expected = both.of_theirs({"one": 1.0}, steps=5, callback_on_step_end=turn)
        near(both.of(switch(["one", "two"], every=2), steps=5), expected)

    def test_composite_is_the_mean_of_the_predictions_with_each_adapter_alone(self, both):
        denoiser = getattr(both.theirs, both.denoiser)
        own = denoiser.forward

        def mean(*args, **kwargs):
            found = []
            for name in ("one", "two"):
                denoiser.set_adapters(name)
                found.append(own(*args, **kwargs)[0])
            return ((found[0] + found[1]) / 2,)

        denoiser.forward = mean
        try:
            expected = both.of_theirs({"one": 1.0, "two": 1.0})
        finally:
            del denoiser.forward
        near(both.of(composite(["one", "two"])), expected)


TWICE = {
    "sd3": {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0},
    "flux": {"true_cfg_scale": 3.0, "negative_prompt": ["ink", "sea"]},
}


@pytest.mark.parametrize("both", TWICE, indirect=True, scope="module")
def test_rows_are_known_where_a_step_calls_the_transformer_a_second_time(both):
    given = {"images": 2, **TWICE[both.kind]}
    found = both.of([None, MIXTURE], PROMPTS, **given)
    near(found[:2], latents(both.ours, PROMPTS, **given)[:2])
    near(found[2:], both.of(MIXTURE, PROMPTS, **given)[2:])


@sd1
class TestWeights:
    def test_weights_by_block_are_those_that_diffusers_has_for_blocks(self, both):
        scales = {"unet": {"down": 0.3, "mid": 0.9, "up": {"block_0": 0.6}}, "text_encoder": -0.4}
        both.theirs.set_adapters("one", [scales])
        # diffusers leaves the middle's convolutions at 1, and those blocks that have no attention
        of_blocks = {"unet.down_blocks.1": 0.3, "unet.mid_block.attentions": 0.9, "unet.up_blocks.0": 0.6}
        near(both.of({"one": {"unet": 1.0, **of_blocks, "text_encoder": -0.4}}), latents(both.theirs))
        # the longest path counts, and what no path names is left out
        near(both.of({"one": {"": 1.0, "unet": 0.0}}), both.of({"one": {"text_encoder": 1.0}}))

    def test_a_function_is_asked_for_each_step_and_once_for_text_encoders(self, both):
        asked = []

        def schedule(step, steps):
            asked.append((step, steps))
            return {"one": 1.0 - step / steps}

        found = both.of(schedule, steps=3)
        # first to see that it gives a mixture; then texts without and with the prompt, and the steps
        assert asked == [(0, 1), (0, 1), (0, 1), (0, 3), (1, 3), (2, 3)]

        def lower(pipe, step, timestep, given):
            pipe.set_adapters("one", 1.0 - (step + 1) / 3)
            return {}

        near(found, both.of_theirs({"one": 1.0}, steps=3, callback_on_step_end=lower))

    def test_a_control_net_is_asked_for_its_step_too_and_has_no_mean(self, both):
        from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

        net = ControlNetModel.from_unet(both.ours.unet, conditioning_embedding_out_channels=(4, 4)).eval()
        pipe = StableDiffusionControlNetPipeline(**both.ours.components, controlnet=net, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        engine = lw.Composer(pipe, [dataclasses.replace(each, fingerprint=None) for each in both.adapters])
        asked = []
        with engine.activate(lambda step, steps: asked.append((step, steps)) or {"one": 1.0}):
            latents(pipe, steps=2, image=torch.rand(1, 3, 16, 16))
        assert asked[-4:] == [(0, 2), (0, 2), (1, 2), (1, 2)]
        with engine.activate(composite(["one"])), pytest.raises(CompositionError, match="'controlnet' does not return one"):
            latents(pipe, image=torch.rand(1, 3, 16, 16))

    def test_a_step_is_known_where_timesteps_are_rounded_to_a_thousandth_in_bf16(self, both, tmp_path):
        pipe = pipeline("flux").to(torch.bfloat16)
        engine = lw.Composer(pipe, {"one": lw.Adapter.from_pretrained(save_trained("flux", tmp_path, 1), model=pipe)})
        asked = []
        with engine.activate(lambda step, steps: asked.append((step, steps)) or {"one": 1.0}):
            latents(pipe, steps=50, dtype=torch.bfloat16)
        assert asked[-50:] == [(step, 50) for step in range(50)]

    def test_k_lora_takes_in_each_layer_the_adapter_whose_largest_entries_weigh_more(self, both):
        content, style = both.adapters
        schedule, alpha, beta = k_lora(content, style), 1.5, 0.5
        deltas = {layer: [each.delta(layer).abs().flatten() for each in both.adapters] for layer in content.layers}
        gamma = sum(float(c.sum() / s.sum()) for c, s in deltas.values()) / len(deltas)
        seen = set()
        for step in range(4):
            weights = schedule(step, 4)
            for layer, (of_c, of_s) in deltas.items():
                top_c, top_s = (float(each.sort(descending=True).values[:6].sum()) for each in (of_c, of_s))
                takes = top_c / gamma > top_s * (alpha * step / 4 + beta)
                assert weights.for_layer(layer).flatten().tolist() == [float(takes), float(not takes)]
                seen.add((takes, step))
        assert {(True, 0), (False, 3)} <= seen
        assert not torch.equal(both.of(schedule), both.of({"one": 1.0}))

    def test_what_each_call_used_is_recorded(self, both):
        with both.engine.record() as trace:
            both.of(switch(["one", "two"]), steps=2)
        used = trace.weights["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
        assert used.abs().sum(dim=(0, 1)).gt(0).tolist() == [True, True]


@sd1
class TestSafety:
    def test_an_error_between_steps_leaves_the_bits_of_the_base(self, both):
        def stop(pipe, step, timestep, given):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            both.of(switch(["one", "two"]), steps=3, callback_on_step_end=stop)
        assert torch.equal(latents(both.ours, PROMPTS), both.base)
        assert not both.engine.active
        assert "forward" not in vars(both.ours.unet)

    def test_another_model_in_the_place_of_a_part_is_noticed(self, both):
        unet = both.ours.unet
        both.ours.unet = pipeline("sd1").unet
        try:
            with pytest.raises(CompositionError, match="'unet' of the pipeline is not the UNet2DConditionModel"):
                both.of(MIXTURE)
        finally:
            both.ours.unet = unet

    def test_rows_that_are_no_multiple_are_refused_with_both_numbers(self, both):
        with pytest.raises(ScopeError, match=r"2 rows, but 'text_encoder' was called with 1"):
            both.of([MIXTURE, None], [PROMPTS[0]])

    def test_rows_in_a_pipeline_of_unknown_batches_are_refused(self, both):
        class Other(type(both.ours)):
            pass

        engine = lw.Composer(Other(**both.ours.components), both.adapters)
        with pytest.raises(ScopeError, match="which rows of a Other's calls belong to which prompt"):
            engine.activate([MIXTURE, None])
        with engine.activate(MIXTURE):
            pass

    def test_a_step_that_the_scheduler_does_not_have_is_refused(self, both):
        both.of(MIXTURE)
        x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
        with both.engine.activate(switch(["one"])), pytest.raises(CompositionError, match=r"at timestep 7\.0"):
            both.ours.unet(x, 7, text)

    @pytest.mark.parametrize(
        ("mixture", "error", "message"),
        [
            (switch(["one", "three"]), None, ""),
            (switch(["three"]), lw.errors.UnknownExpert, "three"),
            (lambda step, steps: 3, WeightingError, "a mixture is"),
            (composite(["one", "three"]), lw.errors.UnknownExpert, "three"),
            ({"one": {"unet.nowhere": 1.0}}, WeightingError, "'unet.nowhere', below which"),
        ],
    )
    def test_a_mixture_that_is_none_is_refused_before_anything_runs(self, both, mixture, error, message):
        if error is None:
            # what a function gives later is seen when it gives it
            with pytest.raises(lw.errors.UnknownExpert, match="three"):
                both.of(mixture)
        else:
            with pytest.raises(error, match=message):
                both.engine.activate(mixture)
        assert not both.engine.active


def test_sets_of_names_that_say_nothing_are_refused():
    for call in (lambda: switch([]), lambda: switch("one"), lambda: switch(["one"], every=0), lambda: Composite(())):
        with pytest.raises(WeightingError):
            call()


def renamed(adapter, change):
    return dataclasses.replace(adapter, layers={change(layer): factors for layer, factors in adapter.layers.items()})


@sd1
class TestPlacing:
    @needs_entry("targets", "kohya")
    def test_a_file_that_names_no_model_is_routed_by_its_paths_with_a_warning(self, both, tmp_path):
        report = both.adapters[0].export(tmp_path / "out", target="kohya")
        adapter = lw.Adapter.from_pretrained(report.folder)
        assert any("text_model" in layer for layer in adapter.layers)
        with pytest.warns(BaseModelUnverified):
            engine = lw.Composer(both.ours, {"one": adapter})
        with engine.activate({"one": 1.0}):
            found = latents(both.ours)
        near(found, both.of({"one": 1.0}))

    @needs_entry("targets", "kohya")
    def test_a_hub_binds_such_a_file_to_the_pipeline_so_that_nothing_is_left_to_warn_of(self, both, tmp_path):
        report = both.adapters[0].export(tmp_path / "out", target="kohya")
        with lw.Hub(tmp_path / "hub") as hub:
            hub.add(report.folder, name="one", base_model="tiny")
            hub.bind("one", both.ours)
            engine = lw.Composer(both.ours, hub.pool(["one"]))
        with engine.activate({"one": 1.0}):
            found = latents(both.ours)
        near(found, both.of({"one": 1.0}))

    def test_an_adapter_of_the_unet_alone_is_put_below_the_unet_and_compared_with_it(self, both):
        own = {layer: factors for layer, factors in both.adapters[0].layers.items() if layer.startswith("unet.")}
        whole = dataclasses.replace(both.adapters[0], layers=own)
        from loraweave.hub.base import fingerprint

        alone = dataclasses.replace(renamed(whole, lambda layer: layer[5:]), fingerprint=fingerprint(both.ours.unet))
        engine = lw.Composer(both.ours, {"alone": alone})
        engine.load("whole", whole)
        with engine.activate({"alone": 1.0}):
            found = latents(both.ours)
        with engine.activate({"whole": 1.0}):
            assert torch.equal(latents(both.ours), found)
        torch.manual_seed(5)
        other = type(both.ours.unet)(**both.ours.unet.config)
        with pytest.raises(BaseModelMismatch, match="'alone' was made for another base model"):
            lw.Composer(both.ours, {"alone": dataclasses.replace(alone, fingerprint=fingerprint(other))})

    def test_a_tensor_that_finds_no_place_is_refused_with_its_name(self, both):
        lost = renamed(both.adapters[0], lambda layer: layer.replace("mid_block", "middle"))
        with pytest.raises(LayerMismatch, match=r"expert 'one' updates layer 'unet\.middle"):
            lw.Composer(both.ours, [lost])


@pytest.mark.parametrize("both", ["sdxl"], indirect=True, scope="module")
def test_a_path_that_two_text_encoders_have_is_refused_with_both(both):
    own = {layer[13:]: each for layer, each in both.adapters[0].layers.items() if layer.startswith("text_encoder.")}
    with pytest.raises(LayerMismatch, match=r"can be 'text_encoder\..* or 'text_encoder_2\."):
        lw.Composer(both.ours, [dataclasses.replace(both.adapters[0], layers=own)])


def test_a_pipeline_of_texts_alone_has_no_parts_that_adapters_are_for():
    class Other:
        components = None

        def __call__(self):
            return None

    with pytest.raises(CompositionError, match="Other has none of the parts"):
        lw.Composer(Other(), [])


def test_where_nothing_reads_a_pipeline_it_is_refused_with_the_part_to_pass(monkeypatch):
    pipe = pipeline("sd1")
    monkeypatch.setattr("loraweave.hub.base.registry.names", lambda folder: [])
    with pytest.raises(CompositionError, match=r": pass its \.unet"):
        lw.Composer(pipe, [])
