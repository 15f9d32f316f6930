"""A layer that the model no longer runs is noticed, whoever put another in its place."""

import peft
import pytest
import torch
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.composer.live.fitting import ModulePaths
from loraweave.errors import CompositionError, LayerMismatch

# peft asks transformers 5 under the former name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


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


@pytest.fixture
def engine(tiny_llama, make_adapters):
    return Composer(tiny_llama, make_adapters(tiny_llama, "llama"))


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


def test_peft_on_the_same_model_is_named(engine):
    base = logits(engine.model)
    wrapped = peft_model(engine.model)
    with pytest.raises(CompositionError, match=r"q_proj' of the model .*unload\(\)"):
        use(engine, "activate")
    wrapped.unload()
    assert torch.equal(logits(engine.model), base)
    use(engine, "activate")


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
    with pytest.raises(LayerMismatch, match=r"peft has put adapters of its own .*unload\(\)"):
        Composer(wrapped.base_model.model, adapters)
    with pytest.raises(LayerMismatch, match="the nearest is 'base_model"):
        Composer(wrapped, adapters)
