"""Layers that a live mixture cannot reach are refused when it is activated, and can be fused into."""

import copy
import pickle

import pytest
import torch
import transformers
from live_models import in_thread, in_whole_graphs
from tiny_models import random_adapter
from torch import Tensor, nn

from loraweave.composer.composer import Composer
from loraweave.composer.model.layers import use_of
from loraweave.errors import CompositionError, LayerMismatch
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors


class Everything(nn.Module):
    """Uses its layers in every way that there is."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.both = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.asked, self.typed, self.within = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.elsewhere, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        nn.init.ones_(self.called.weight)

    def tie_weights(self):
        self.called.weight = self.called.weight

    def fused_weights(self):
        return torch.cat([self.elsewhere.weight, self.called.weight])

    def forward(self, x):
        x = self.called(x) if x.ndim else self.both(x)
        return self.rest(nn.functional.linear(x, self.read.weight, self.read.bias))

    def rest(self, x):
        x = x @ self.both.weight.T
        if isinstance(self.typed.weight, Tensor) and self.asked.weight.dtype == x.dtype:
            x = self.typed(x) + self.asked(x.to(self.asked.weight.device))
        return sum([x @ weight for weight in [self.within.weight]])


USES = {"called": "called", "read": "read", "both": "both", "asked": "called", "typed": "called", "within": "read"}


@pytest.mark.parametrize(("name", "use"), [*USES.items(), ("elsewhere", "called"), ("unused", "called")])
def test_how_a_layer_is_used_is_seen_from_its_owners_methods(name, use):
    assert use_of(Everything(), name) == use

    class Inheriting(Everything):
        pass

    assert use_of(Inheriting(), name) == use


def _attention():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4)
    return nn.Sequential(nn.MultiheadAttention(4, 2)).eval(), "0.out_proj", lambda model: model[0](x, x, x)[0]


def _wavlm():
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    sizes |= {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_feat_extract_layers": 1}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = transformers.WavLMModel(transformers.WavLMConfig(**sizes)).eval()
    model.name_or_path = "tiny"
    x = torch.randn(2, 20)
    return model, "encoder.layers.0.attention.v_proj", lambda model: model(x).last_hidden_state


@pytest.mark.parametrize("make", [_attention, _wavlm])
@torch.no_grad()
def test_a_layer_that_its_owner_never_calls_is_refused_live_and_fused_right(make):
    model, layer, run = make()
    own = random_adapter("a", {layer: (2, 4, 4)})
    base = run(model)
    engine = Composer(model, [own])
    for mixture in ({"a": 1.0}, [{"a": 1.0}, None]):
        with pytest.raises(LayerMismatch, match=rf"'a' updates layer '{layer}'.*never calls.*use fused\(\)"):
            engine.activate(mixture)
    with engine.activate({"a": 0.0}):
        assert torch.equal(run(model), base)
    module = model.get_submodule(layer)
    original = module.weight.clone()
    module.weight += own.layers[layer].b_OR @ own.layers[layer].a_RI
    expected = run(model)
    module.weight.copy_(original)
    with engine.fused({"a": 1.0}):
        assert torch.allclose(run(model), expected, rtol=1e-5, atol=1e-5)
    assert float((expected - base).abs().max()) > 1e-3
    assert torch.equal(run(model), base)


def test_a_router_is_refused_for_a_layer_that_never_runs():
    class Constant:
        def weights(self, x_BTI, layer):
            return torch.ones(1, 1, 1)

    model, layer, _ = _attention()
    with pytest.raises(LayerMismatch, match="never calls"):
        Composer(model, [random_adapter("a", {layer: (2, 4, 4)})]).activate(Constant())


class Sometimes(nn.Module):
    """Calls its layer, or with `fast` computes with its weight."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.fast = False

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight, self.inner.bias) if self.fast else self.inner(x)


@torch.no_grad()
def test_an_owner_that_did_not_call_its_layer_this_time_is_noticed():
    torch.manual_seed(0)
    model, x = nn.Sequential(Sometimes()), torch.randn(2, 4)
    base, own = model(x), {name: set(vars(module)) for name, module in model.named_modules()}
    engine = Composer(model, [random_adapter("a", {"0.inner": (2, 4, 4)})])
    with engine.activate({"a": 1.0}):
        live = model(x)
        model[0].fast = True
        with pytest.raises(CompositionError, match=r"layer '0.inner' did not run: its Sometimes.*use fused\(\)"):
            model(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.allclose(copied(x), base)
            for name, module in copied.named_modules():
                assert not {**module._forward_hooks, **module._forward_pre_hooks}
                assert vars(module).keys() == own[name]
        with engine.activate({}):
            assert torch.allclose(model(x), base)
        assert in_thread(lambda: model(x)).shape == base.shape
        model[0].fast = False
        assert torch.equal(model(x), live)
    model[0].fast = True
    assert torch.allclose(model(x), base)
    with engine.fused({"a": 1.0}):
        assert torch.allclose(model(x), live, rtol=1e-5, atol=1e-5)
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 0


@torch.no_grad()
@in_whole_graphs
def test_a_layer_with_a_watched_owner_can_be_compiled():
    torch.manual_seed(0)
    model, x = nn.Sequential(Sometimes()), torch.randn(2, 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    base = compiled(x)
    with Composer(model, [random_adapter("a", {"0.inner": (2, 4, 4)})]).activate([{"a": 1.0}, None]):
        assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(compiled(x), base)


class Model(nn.Module):
    """Embeds tokens unless they are embedded already, and looks its own weight up, as gemma 4 does."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, ids=None, embedded=None):
        embedded = self.embed_tokens(ids) if embedded is None else embedded
        return (embedded[:, :, None] == self.embed_tokens.weight).all(dim=-1)


@torch.no_grad()
def test_tokens_may_come_embedded():
    model, ids = nn.Sequential(Model()), torch.tensor([[1, 4, 2]])
    update = Factors(torch.ones(1, 5), torch.ones(4, 1), kind="embedding")
    with Composer(model, [Adapter("a", "tiny", {"0.embed_tokens": update})]).activate({"a": 1.0}):
        assert not bool(model(ids).any())
        embedded = model[0].embed_tokens(ids)
        assert torch.equal(model[0](embedded=embedded), model(ids))
