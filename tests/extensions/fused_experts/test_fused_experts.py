"""LoRA on fused experts, live and fused, against the installed peft: tiny random models of each layout of transformers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from expert_families import (
    EXPERTS,
    FAMILIES,
    IDS,
    WARNINGS,
    both,
    logits,
    make,
    near,
    save_families,
)
from peft import LoraConfig, PeftModel, get_peft_model
from rounding import assert_near, num_terms, rounding
from torch.utils._python_dispatch import TorchDispatchMode

from loraweave.composer.composer import Composer
from loraweave.errors import CompositionError, LayerMismatch, ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

pytestmark = WARNINGS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_families(tmp_path_factory)


@pytest.mark.parametrize("family", FAMILIES)
def test_live_and_fused_equal_peft_and_leaving_is_bit_exact(family, saved):
    theirs, ours = saved(family)
    model = make(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    base, engine = logits(model), Composer(model, ours)
    for name in ours:
        expected = logits(theirs[name])
        assert float((expected - base).abs().max()) > 0.1
        with engine.activate({name: 1.0}):
            near(logits(model), expected)
        with engine.fused({name: 1.0}):
            near(logits(model), expected)
    with engine.fused({"a": 1.0}, originals="disk") as fused:
        fused.switch({"a": 0.3, "b": -0.5})
        mixed = logits(model)
        assert copy.deepcopy(model).state_dict().keys() == before.keys()
    with engine.activate({"a": 0.3, "b": -0.5}):
        near(logits(model), mixed)
    with engine.activate([{"a": 0.0}, None, {}]):
        assert torch.equal(logits(model), base)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_and_token_has_its_own_mixture(family, saved):
    theirs, ours = saved(family)
    model = make(family)
    base, engine = logits(model), Composer(model, ours)
    with engine.activate([{"a": 1.0}, None, {"b": 1.0}]):
        rows = logits(model)
        twice = logits(model, IDS.repeat_interleave(2, dim=0))
    near(rows[0], logits(theirs["a"])[0])
    # not to the bit: an expert multiplies the tokens of all rows at once
    near(rows[1], base[1])
    near(rows[2], logits(theirs["b"])[2])
    near(twice, rows.repeat_interleave(2, dim=0))
    # "a" up to the third token, from then on "b": rows differ by what they had before
    w_BTE = torch.zeros(3, 6, 1, 2)
    w_BTE[:, :3, 0, 0], w_BTE[:, 3:, 0, 1] = 1, 1
    w_BTE[1] = 0
    with engine.activate(MixtureWeights(w_BTE, ("a", "b"))):
        tokens = logits(model)
        alone = [logits_of_row(engine, model, w_BTE, row) for row in (0, 2)]
    near(tokens[[0, 2], :3], logits(theirs["a"])[[0, 2], :3])
    near(tokens[1], base[1])
    near(torch.cat(alone), tokens[[0, 2]])
    of_experts = {
        name: replace(each, layers={k: v for k, v in each.layers.items() if v.kind == "expert"})
        for name, each in ours.items()
    }
    with (
        Composer(model, of_experts).activate(MixtureWeights(w_BTE, ("a", "b"))),
        pytest.raises(ScopeError, match=r"have 6 tokens, but layer '.*' has 36 in a call of 3 rows"),
    ):
        logits(model, torch.cat([IDS, IDS], dim=1))


def logits_of_row(engine, model, w_BTE, row):
    with engine.activate(MixtureWeights(w_BTE[row : row + 1], ("a", "b"))):
        return logits(model, IDS[row : row + 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_inputs_and_weights_are_pefts(family, saved):
    theirs, ours = saved(family)
    target = torch.randn(3, 6, 61, generator=torch.Generator().manual_seed(2))

    def loss(model, x):
        return (model(inputs_embeds=x, use_cache=False).logits * target).sum()

    expected = theirs["a"]
    x = expected.get_input_embeddings()(IDS).detach().requires_grad_()
    loss(expected, x).backward()
    # the update is linear in w b, so that d loss / d w is the sum of b times its gradient
    slopes = torch.cat([(p.detach() * p.grad).flatten() for name, p in expected.named_parameters() if "lora_B" in name])
    wanted = x.grad.clone()
    expected.zero_grad()
    model, own_x = make(family), x.detach().clone().requires_grad_()
    w_E = torch.ones(1, 1, 1, 1, requires_grad=True)
    with Composer(model, {"a": ours["a"]}).activate(MixtureWeights(w_E, ("a",))):
        loss(model, own_x).backward()
    scale = float(wanted.abs().max())
    torch.testing.assert_close(own_x.grad / scale, wanted / scale, atol=1e-5, rtol=1e-5)
    off = 2 * float(rounding(num_terms(model), slopes.abs().sum()))
    assert float(w_E.grad) == pytest.approx(float(slopes.sum()), rel=0, abs=off)


@both
def test_only_tokens_that_reached_an_expert_are_multiplied_and_no_update_of_three_axes_is_made(family, saved):
    _, ours = saved(family)
    model = make(family)
    engine = Composer(model, ours)
    place = next(layer for layer in engine.target_layers if layer.endswith("experts.down_proj.0")).removesuffix(
        ".down_proj.0"
    )
    experts, seen = model.get_submodule(place), []
    fused = {tuple(experts.gate_up_proj.shape), tuple(experts.down_proj.shape)}
    fused |= {(count, inputs, outputs) for count, outputs, inputs in fused}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    experts.register_forward_pre_hook(lambda module, args: seen.append(args))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and tuple(found.shape) in fused:
                # nothing but views of the parameters
                assert found.untyped_storage().data_ptr() in own, function
            return found

    with engine.activate({"a": 1.0, "b": 0.5}), engine.record() as trace, Watch():
        logits(model)
    if family == "mixtral":
        counts = torch.bincount(seen[0][1].flatten(), minlength=5).tolist()
    else:
        counts = seen[0][0].reshape(5, -1, 16).any(dim=-1).sum(dim=1).tolist()
    assert 0 < min(count for count in counts if count) < IDS.numel()
    for expert, count in enumerate(counts):
        calls = trace.calls(f"{place}.down_proj.{expert}")
        assert [call.num_rows * call.num_tokens for call in calls] == ([count] if count else [])


class Constant:
    def weights(self, x_BTI, layer):
        return torch.tensor([[[0.7, 0.0]]])


class ByInput:
    def weights(self, x_BTI, layer):
        w_BT1 = torch.sigmoid(x_BTI.sum(dim=-1, keepdim=True))
        return torch.cat([w_BT1, 1 - w_BT1], dim=-1)


class Begins(ByInput):
    def begin(self, model, arguments):
        return self


@both
def test_a_router_weighs_each_token_at_each_expert(family, saved):
    _, ours = saved(family)
    model = make(family)
    engine = Composer(model, ours)
    with engine.activate({"a": 0.7}):
        expected = logits(model)
    with engine.activate(Constant()):
        near(logits(model), expected)
    with engine.activate(ByInput()):
        rows = logits(model)
        near(torch.cat([logits(model, IDS[row : row + 1]) for row in range(3)]), rows)
    assert float((rows - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("router", [Begins(), [Constant(), None, Constant()]])
def test_a_router_that_looks_at_more_than_the_tokens_that_reach_an_expert_is_refused(router, saved):
    _, ours = saved("mixtral")
    engine = Composer(make(), ours)
    with pytest.raises(ScopeError, match=r"'a' updates layer '.*', an expert of a fused parameter"):
        engine.activate(router)
    assert not engine.active


@both
def test_generation_with_a_cache_gives_each_row_its_own_answer(family, saved):
    _, ours = saved(family)
    model = make(family)
    engine = Composer(model, ours)
    settings = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with engine.activate([{"a": 1.0}, None, {"b": 1.0}]):
        found = model.generate(IDS, **settings)
    settings["attention_mask"] = torch.ones_like(IDS[:1])
    for row, mixture in enumerate([{"a": 1.0}, {}, {"b": 1.0}]):
        with engine.activate(mixture):
            alone = model.generate(IDS[row : row + 1], **settings)[0]
        assert torch.equal(found[row, : len(alone)], alone)


def test_compiled_code_answers_as_eagerly(saved, fresh_compiler):
    _, ours = saved("mixtral")
    model = make()
    engine, block = Composer(model, ours), model.model.layers[0].mlp
    compiled = torch.compile(block, backend="eager")
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = block(x)
        for mixture in ([{"a": 1.0}, None, {"b": 1.0}], {"b": 0.5}):
            with engine.activate(mixture):
                near(compiled(x), block(x))
                assert float((compiled(x) - plain).abs().max()) > 1e-2
        near(compiled(x), plain)


def test_a_block_that_checkpointing_runs_again_has_the_same_gradients(saved):
    _, ours = saved("mixtral")
    model = make()
    engine = Composer(model, ours)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": True})
        x = model.train(checkpointed).get_input_embeddings()(IDS).detach().requires_grad_()
        with engine.activate({"a": 1.0}):
            model(inputs_embeds=x, use_cache=False).logits.sum().backward()
        gradients.append(x.grad)
    near(gradients[1], gradients[0])


def test_half_precision_is_near_the_fused_weights(saved):
    _, ours = saved("gpt_oss")
    model = make("gpt_oss").bfloat16()
    engine = Composer(model, ours)
    with engine.activate({"a": 0.5}):
        live = logits(model).float()
    with engine.fused({"a": 0.5}):
        fused = logits(model).float()
    # ten operations after one another in each of two layers, and the head, round to bfloat16
    assert_near(live, fused, 10 * 2 + 1, dtype=torch.bfloat16)


def test_a_class_with_another_forward_is_fused_but_not_mixed_live(saved):
    _, ours = saved("mixtral")
    model = make()

    class Doubled(type(model.model.layers[0].mlp.experts)):
        def forward(self, *given):
            return 2 * super().forward(*given)

    for layer in model.model.layers:
        layer.mlp.experts.__class__ = Doubled
    engine = Composer(model, ours)
    with pytest.raises(LayerMismatch, match=r"one of the experts of a Doubled, whose forward is its own: use fused\(\)"):
        engine.activate({"a": 1.0})
    base = logits(model)
    with engine.fused({"a": 1.0}):
        assert float((logits(model) - base).abs().max()) > 0.1
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    ("layer", "sizes", "message"),
    [
        ("mlp.experts.gate_up_proj.5", (48, 16), "has 5 experts of"),
        ("mlp.experts.gate_up_proj.0", (16, 48), r"shape \(O, I\) = \(16, 48\), but the model has 5 experts of \(48, 16\)"),
        ("mlp.experts.gate_up_proj", (48, 16), "which has none, not"),
        ("mlp.experts.up_proj.0", (48, 16), "which has none, not"),
        ("mlp.gate.weight.0", (5, 16), r"a MixtralTopKRouter, which has one of shape \(5, 16\)"),
        ("mlp.router.weight.0", (5, 16), "does not have"),
    ],
)
def test_an_expert_that_the_model_does_not_have_is_named(layer, sizes, message):
    update = Factors(torch.ones(1, sizes[1]), torch.ones(sizes[0], 1), kind="expert")
    with pytest.raises(LayerMismatch, match=message):
        Composer(make(), [Adapter("x", "tiny", {f"model.layers.0.{layer}": update})])


def test_parts_that_are_not_low_rank_and_weights_without_values_are_refused():
    name = "model.layers.0.mlp.experts.down_proj.0"
    update = Factors(torch.ones(1, 24), torch.ones(16, 1), kind="expert")
    biased = Factors(update.a_RI, update.b_OR, bias_O=torch.ones(16), kind="expert")
    with pytest.raises(LayerMismatch, match="gain or a bias"):
        Composer(make(), [Adapter("x", "tiny", {name: biased})])
    inside = get_peft_model(make(), LoraConfig(target_modules=[], target_parameters=EXPERTS)).base_model.model
    with pytest.raises(CompositionError, match="is peft's ParamWrapper"):
        Composer(inside, [Adapter("x", "tiny", {name: update})])
    with pytest.raises(CompositionError, match="meta device"):
        Composer(make().to("meta"), [Adapter("x", "tiny", {name: update})])


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_opens_what_is_written_and_a_hub_keeps_it(family, saved, tmp_path):
    theirs, ours = saved(family)
    ours["a"].save_pretrained(tmp_path / "a")
    near(logits(PeftModel.from_pretrained(make(family), str(tmp_path / "a"))), logits(theirs["a"]))
    model = make(family)
    with Hub(tmp_path / "hub") as hub:
        for name in ours:
            hub.add(ours[name], license="mit", model=model)
            assert hub.bind(name, model).fingerprint is not None
        wrong = {f"{layer[:-1]}0{layer[-1]}": part for layer, part in ours["b"].layers.items()}
        hub.add(replace(ours["b"], layers=wrong), name="c", license="mit")
        with pytest.raises(LayerMismatch, match=r"adapter 'c' updates expert 0\d of parameter 'down_proj'"):
            hub.bind("c", model)
        # a lazy pool brings experts while another activation is open
        engine = Composer(model, hub.pool(["a", "b"]))
        with engine.activate({"b": 1.0}):
            near(logits(model), logits(theirs["b"]))
            with engine.activate({"a": 1.0}):
                near(logits(model), logits(theirs["a"]))


def test_a_block_that_computes_with_the_experts_itself_is_an_error(saved, monkeypatch):
    _, ours = saved("mixtral")
    model = make()
    block = type(model.model.layers[0].mlp)
    engine = Composer(model, ours)
    with engine.activate({"a": 1.0}):
        monkeypatch.setattr(block, "forward", lambda self, x: x)
        for layer in model.model.layers:
            monkeypatch.delitem(vars(layer.mlp), "forward", raising=False)
        with pytest.raises(CompositionError, match=r"layer 'model\.layers\.0\.mlp\.experts' did not run"):
            logits(model)


def test_experts_beside_an_activated_lora_are_refused(saved):
    _, ours = saved("mixtral")
    model = make()
    layer = "model.layers.0.self_attn.q_proj"
    factors = Factors(torch.randn(2, 16), torch.randn(16, 2))
    engine = Composer(model, {**ours, "judge": Adapter("judge", "tiny", {layer: factors}, invocation=(5,))})
    with pytest.raises(ScopeError, match="no adapter with invocation tokens beside it"):
        engine.activate({"judge": 1.0, "a": 1.0})
    with engine.activate({"judge": 1.0}):
        logits(model)


def test_updates_of_rank_zero_add_nothing(saved):
    _, ours = saved("mixtral")
    model = make()
    empty = {
        layer: replace(part, a_RI=part.a_RI[:0], b_OR=part.b_OR[:, :0])
        for layer, part in ours["a"].layers.items()
        if part.kind == "expert"
    }
    engine = Composer(model, {"a": ours["a"], "empty": Adapter("empty", "tiny", empty)})
    with engine.activate({"empty": 1.0}):
        near(logits(model), logits(make()))
