"""A change of the model is noticed: another layer in a place, and other weights than those that an expert depends on."""

from dataclasses import replace

import peft
import pytest
import torch
from live_models import logits
from rounding import assert_near, num_terms
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.composer.live.fitting import ModulePaths
from loraweave.errors import CompositionError

# peft asks transformers 5 under the former name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_another_module_anywhere_on_the_way_is_named():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    paths = ModulePaths(model)
    paths.add(["0.0", "1"])
    paths.require_unchanged()
    first, inner = model[0], model[0][0]
    model[0] = nn.Sequential(inner)
    with pytest.raises(CompositionError, match=r"'0' of the model is not the Sequential .* another Sequential"):
        paths.require_unchanged()
    model[0] = first
    first[0] = nn.Linear(2, 2)
    with pytest.raises(CompositionError, match=r"'0\.0' of the model"):
        paths.require_unchanged()
    first[0] = inner
    del model[1]
    with pytest.raises(CompositionError, match=r"'1' of the model .* but gone"):
        paths.require_unchanged()


def use(engine, how):
    with engine.activate({"a": 1.0}) if how == "activate" else engine.fused({"a": 1.0}):
        pass


@pytest.mark.parametrize("how", ["activate", "fused"])
def test_a_layer_replaced_since_is_refused(how, engine):
    own = engine.model.lm_head
    engine.model.lm_head = nn.Linear(16, 61)
    with pytest.raises(CompositionError, match="'lm_head' of the model is not the Linear that was there"):
        use(engine, how)
    assert not engine.active
    engine.model.lm_head = own
    use(engine, how)


@pytest.mark.own_models
def test_resized_token_embeddings_are_noticed_where_they_replace_a_target(engine, tiny_llama, make_adapter):
    elsewhere = Composer(tiny_llama, [make_adapter(tiny_llama, "a", targets=("q_proj",))])
    tiny_llama.resize_token_embeddings(70, mean_resizing=False)
    with pytest.raises(CompositionError, match="'lm_head'"):
        use(engine, "activate")
    base = logits(tiny_llama)
    with elsewhere.activate({"a": 1.0}):
        assert logits(tiny_llama).shape == (3, 7, 70)
        assert not torch.allclose(logits(tiny_llama), base)
    assert torch.equal(logits(tiny_llama), base)


def test_a_layer_replaced_while_active_is_refused_before_any_layer_runs(engine):
    base = logits(engine.model)
    own = engine.model.lm_head
    with engine.activate({"a": 1.0}):
        engine.model.lm_head = nn.Linear(16, 61)
        calls = []
        handle = engine.model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(CompositionError, match="'lm_head' of the model is not the Linear that was there"):
            logits(engine.model)
        assert calls == []
        handle.remove()
        engine.model.lm_head = own
    assert torch.equal(logits(engine.model), base)
    assert "forward" not in vars(own)


def peft_model(model):
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.own_models
def test_peft_on_the_same_model_is_named(engine):
    base = logits(engine.model)
    wrapped = peft_model(engine.model)
    with pytest.raises(CompositionError, match=r"q_proj' of the model .*unload\(\)"):
        use(engine, "activate")
    wrapped.unload()
    assert torch.equal(logits(engine.model), base)
    use(engine, "activate")


@pytest.mark.own_models
def test_peft_put_in_while_active_is_named_and_goes_without_a_trace(engine):
    base = logits(engine.model)
    with engine.activate({"a": 1.0}):
        mixed = logits(engine.model)
        wrapped = peft_model(engine.model)
        with pytest.raises(CompositionError, match=r"q_proj' of the model .*unload\(\)"):
            logits(engine.model)
        wrapped.unload()
        assert torch.equal(logits(engine.model), mixed)
    assert torch.equal(logits(engine.model), base)


def test_a_model_with_pefts_adapters_in_it_is_refused(make_model, make_adapters):
    model = make_model("llama")
    adapters = make_adapters(model, "llama")
    wrapped = peft_model(model)
    for refused in (wrapped.base_model.model, wrapped):
        with pytest.raises(CompositionError, match=r"of peft.*unload\(\)"):
            Composer(refused, adapters)


LAYER = "model.layers.1.self_attn.q_proj"
CHANGED = rf"weight of layer '{LAYER}' has changed since expert 'd', .* engine\.swap\(engine\.pool\)"


@pytest.fixture
def engine(tiny_llama, pool):
    return Composer(tiny_llama, pool)


@pytest.fixture
def model(make_model):
    return make_model("llama", dtype=torch.float64)


@pytest.fixture
def of_dora(model, make_adapter):
    """One expert with DoRA's magnitude, which has no fingerprint of the base, and a plain one."""
    plain = make_adapter(model, "d", targets=("q_proj",))
    layers = {name: replace(f, magnitude_O=torch.linspace(0.5, 2.0, f.b_OR.shape[0])) for name, f in plain.layers.items()}
    return Composer(model, [replace(plain, layers=layers, fingerprint=None), make_adapter(model, "p", seed=1)])


def of_the_formula(model, adapter):
    """What the model answers with DoRA's m (W + b a) / |W + b a| for W."""
    before = {name: model.get_submodule(name).weight.detach().clone() for name in adapter.layers}
    with torch.no_grad():
        for name, f in adapter.layers.items():
            direction_OI = before[name] + f.b_OR.double() @ f.a_RI.double()
            scale_O1 = f.magnitude_O.double()[:, None] / direction_OI.norm(dim=1, keepdim=True)
            model.get_submodule(name).weight.copy_(scale_O1 * direction_OI)
        found = logits(model)
        for name, weight_OI in before.items():
            model.get_submodule(name).weight.copy_(weight_OI)
    return found


def in_place(layer):
    with torch.no_grad():
        layer.weight[3] *= 2


def through_data(layer):
    layer.weight.data *= 2


def loaded(layer):
    layer.load_state_dict({"weight": layer.weight * 0.5})


def replaced(layer):
    layer.weight = nn.Parameter(layer.weight.detach() + 0.1)


@pytest.mark.parametrize("change", [in_place, through_data, loaded, replaced])
def test_a_gain_of_other_weights_is_refused_and_swap_takes_the_new_ones(change, model, of_dora):
    change(model.get_submodule(LAYER))
    with pytest.raises(CompositionError, match=CHANGED):
        of_dora.activate({"d": 1.0})
    with pytest.raises(CompositionError, match=CHANGED), of_dora.fused({"d": 1.0}):
        pass
    with of_dora.activate({"p": 1.0}):
        logits(model)
    expected = of_the_formula(model, of_dora.pool.adapters["d"])
    of_dora.swap(of_dora.pool)
    with of_dora.activate({"d": 1.0}):
        assert_near(logits(model), expected, num_terms(model), dtype=torch.float32)
    with of_dora.fused({"d": 1.0}):
        assert_near(logits(model), expected, num_terms(model), dtype=torch.float32)


def test_a_change_within_an_activation_is_refused_in_the_next_call(model, of_dora):
    with of_dora.activate({"d": 1.0}):
        logits(model)
        in_place(model.get_submodule(LAYER))
        with pytest.raises(CompositionError, match=CHANGED):
            logits(model)
        with of_dora.activate({"p": 1.0}):
            logits(model)


def test_a_trained_bias_of_another_base_s_bias_is_refused(model, make_adapter):
    layer = model.get_submodule(LAYER)
    layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=torch.float64))
    plain = make_adapter(model, "d", targets=("q_proj",))
    layers = {LAYER: replace(plain.layers[LAYER], base_bias_O=torch.ones(layer.out_features))}
    engine = Composer(model, [replace(plain, layers=layers, fingerprint=None)])
    with torch.no_grad():
        layer.bias[0] = 5
    with pytest.raises(CompositionError, match=f"bias of layer '{LAYER}' has changed"):
        engine.activate({"d": 1.0})


def test_what_is_fused_and_restored_moved_or_cast_is_no_change(model, of_dora):
    with of_dora.activate({"d": 1.0}):
        before = logits(model)
    with of_dora.fused({"p": 1.0}) as handle:
        handle.switch({"d": 1.0})
    with of_dora.activate({"d": 1.0}):
        assert torch.equal(logits(model), before)
    model.float()
    with of_dora.activate({"d": 1.0}):
        torch.testing.assert_close(logits(model), before.float(), rtol=1e-4, atol=1e-5)
    model.to(torch.bfloat16)
    with of_dora.activate({"d": 1.0}):
        logits(model)


def test_an_expert_that_is_loaded_later_is_of_the_weights_of_then(model, of_dora):
    in_place(model.get_submodule(LAYER))
    dora = of_dora.pool.adapters["d"]
    of_dora.load("e", replace(dora, name="e"))
    expected = of_the_formula(model, dora)
    with of_dora.activate({"e": 1.0}):
        assert_near(logits(model), expected, num_terms(model), dtype=torch.float32)
    with pytest.raises(CompositionError, match=CHANGED):
        of_dora.activate({"d": 1.0})
