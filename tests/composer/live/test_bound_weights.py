"""What depends on the base's weights is never calculated from older ones than the model has."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.errors import CompositionError

IDS = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(5))
LAYER = "model.layers.1.self_attn.q_proj"
CHANGED = rf"weight of layer '{LAYER}' has changed since expert 'd', .* engine\.swap\(engine\.pool\)"


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture
def model(make_model):
    return make_model("llama", dtype=torch.float64)


@pytest.fixture
def engine(model, make_adapter):
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
def test_a_gain_of_other_weights_is_refused_and_swap_takes_the_new_ones(change, model, engine):
    change(model.get_submodule(LAYER))
    with pytest.raises(CompositionError, match=CHANGED):
        engine.activate({"d": 1.0})
    with pytest.raises(CompositionError, match=CHANGED), engine.fused({"d": 1.0}):
        pass
    with engine.activate({"p": 1.0}):
        logits(model)
    expected = of_the_formula(model, engine.pool.adapters["d"])
    engine.swap(engine.pool)
    with engine.activate({"d": 1.0}):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    with engine.fused({"d": 1.0}):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_a_change_within_an_activation_is_refused_in_the_next_call(model, engine):
    with engine.activate({"d": 1.0}):
        logits(model)
        in_place(model.get_submodule(LAYER))
        with pytest.raises(CompositionError, match=CHANGED):
            logits(model)
        with engine.activate({"p": 1.0}):
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


def test_what_is_fused_and_restored_moved_or_cast_is_no_change(model, engine):
    with engine.activate({"d": 1.0}):
        before = logits(model)
    with engine.fused({"p": 1.0}) as handle:
        handle.switch({"d": 1.0})
    with engine.activate({"d": 1.0}):
        assert torch.equal(logits(model), before)
    model.float()
    with engine.activate({"d": 1.0}):
        torch.testing.assert_close(logits(model), before.float(), rtol=1e-4, atol=1e-5)
    model.to(torch.bfloat16)
    with engine.activate({"d": 1.0}):
        logits(model)


def test_an_expert_that_is_loaded_later_is_of_the_weights_of_then(model, engine):
    in_place(model.get_submodule(LAYER))
    dora = engine.pool.adapters["d"]
    engine.load("e", replace(dora, name="e"))
    expected = of_the_formula(model, dora)
    with engine.activate({"e": 1.0}):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(CompositionError, match=CHANGED):
        engine.activate({"d": 1.0})
