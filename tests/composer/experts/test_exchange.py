"""Single experts that go into an expert model."""

import pytest
import torch

import loraweave as lw
from loraweave.composer.experts.make import put_expert
from loraweave.errors import LayerMismatch, ScopeError, UnknownName, WeightingError

IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [6, 2, 25, 3, 15]])


def client(model, seed, **options):
    """One of two experts for each token, with experts and gates of its own."""
    made = lw.experts("mixtral", model, **{"rank": 4, "num_experts": 2, "target_modules": ("q_proj", "v_proj"), **options})
    generator = torch.Generator().manual_seed(seed)
    for layer in made.layers.values():
        random = [tuple(torch.randn(part.shape, generator=generator) for part in start) for start in layer.starts()]
        layer.reset(random)
    with torch.no_grad():
        for gate in made.gates.parameters():
            gate.copy_(torch.randn(gate.shape, generator=generator))
    return made


def test_an_expert_is_an_adapter_from_now_on(make_model, make_adapter):
    model = make_model("llama")
    adapter = make_adapter(model, "given", rank=3, targets=("q_proj",))
    made = put_expert(client(model, 1), 1, adapter)
    back = made.expert(1)
    for name in made.sites:
        expected = adapter.delta(name) if name in adapter.layers else torch.zeros_like(back.delta(name))
        torch.testing.assert_close(back.delta(name), expected)


def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(make_model, make_adapter):
    model = make_model("llama")
    made = client(model, 1)
    before = made.expert(0).hash
    with pytest.raises(LayerMismatch, match=r"updates 'model.layers.0.mlp.down_proj', which has no experts here"):
        put_expert(made, 0, make_adapter(model, "given", targets=("q_proj", "down_proj")))
    with pytest.raises(LayerMismatch, match=r"inputs and outputs \(5, 16, 16\) .* and expert 0 takes \(4, 16, 16\)"):
        put_expert(made, 0, make_adapter(model, "given", rank=5))
    with pytest.raises(UnknownName, match="recipe 'mixtral' has no expert 2 in any layer"):
        put_expert(made, 2, make_adapter(model, "given", rank=2))
    assert made.expert(0).hash == before


def test_experts_that_share_a_factor_are_not_exchanged(make_model, make_adapter):
    with lw.experts("hydralora", make_model("llama"), rank=2) as made:
        before = {name: value.clone() for name, value in made.expert_state().items()}
        with pytest.raises(ScopeError, match="share a factor or have gains"):
            put_expert(made, 1, make_adapter(made.base_model, "one", rank=2))
        assert all(torch.equal(value, before[name]) for name, value in made.expert_state().items())


@pytest.mark.parametrize("given", [None, "adapter"])
def test_what_is_no_adapter_is_not_put_in(make_model, given):
    made = client(make_model("llama"), 1)
    before = made.expert(0).hash
    with pytest.raises(WeightingError, match=f"expert 0 of recipe 'mixtral' would be {given!r}, not an adapter"):
        put_expert(made, 0, given)
    assert made.expert(0).hash == before


def test_a_base_alone_is_refused_with_the_way_out(make_model):
    with pytest.raises(WeightingError, match=r"given LlamaForCausalLM, which has no experts: give what lw.experts"):
        put_expert(make_model("llama"), 0, None)


def test_a_batch_of_no_rows_is_refused(make_model):
    made = lw.experts("mixtral", make_model("llama"), rank=2)
    empty_BT = torch.zeros(0, 3, dtype=torch.long)
    with pytest.raises(ScopeError, match=r"inputs of shape \(0, 3\), with no rows"):
        made(input_ids=empty_BT)
    with pytest.raises(ScopeError, match=r"inputs of shape \(0, 3\), with no rows"):
        made.generate(input_ids=empty_BT, attention_mask=empty_BT, max_new_tokens=2)
