"""Models that put something else than the batch first: weights by row are refused there, one mixture for all rows works."""

import pytest
import torch
import transformers
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.composer.live import call
from loraweave.errors import ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

IDS = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(1))


def _xlnet():
    config = transformers.XLNetConfig(vocab_size=61, d_model=16, n_layer=1, n_head=2, d_inner=24)
    return transformers.XLNetModel(config), "layer.0.ff.layer_1", "linear"


def _xlnet_embedding():
    return _xlnet()[0], "word_embedding", "embedding"


def _longformer():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.LongformerConfig(
        vocab_size=61, attention_window=4, pad_token_id=0, max_position_embeddings=64, **sizes
    )
    return transformers.LongformerModel(config), "encoder.layer.0.attention.self.value", "linear"


@pytest.mark.parametrize("make", [_xlnet, _xlnet_embedding, _longformer])
@torch.no_grad()
def test_weights_by_row_are_refused_where_the_tokens_come_first(make):
    torch.manual_seed(0)
    model, layer, kind = make()
    model.eval().name_or_path = "tiny"
    module = model.get_submodule(layer)
    size = (16, 61) if kind == "embedding" else tuple(module.weight.shape)
    update = Factors(torch.randn(2, size[1]), torch.randn(size[0], 2), kind=kind)
    engine = Composer(model, [Adapter("a", "tiny", {layer: update})])
    base = model(input_ids=IDS).last_hidden_state
    for mixture in ([{"a": 1.0}, None, None], MixtureWeights(torch.ones(1, 3, 1, 1), ("a",))):
        with engine.activate(mixture), pytest.raises(ScopeError, match=rf"'{layer}' is \(\d, 3, .*second axis"):
            model(input_ids=IDS)
    delta_OI = update.b_OR @ update.a_RI
    with engine.activate({"a": 1.0}):
        live = model(input_ids=IDS).last_hidden_state
    module.weight += delta_OI.T if kind == "embedding" else delta_OI
    assert torch.allclose(live, model(input_ids=IDS).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(live, base, atol=1e-2)


class Counting(nn.Module):
    """A layer that meets three windows of each row."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        if x.shape[1] == 5:
            raise RuntimeError("injected")
        return self.inner(x.unflatten(1, (3, -1)).flatten(0, 1))


@torch.no_grad()
def test_windows_of_a_row_are_its_own_and_an_error_leaves_no_rows_behind():
    torch.manual_seed(0)
    model = Counting()
    update = Factors(torch.randn(2, 4), torch.randn(4, 2))
    engine = Composer(model, [Adapter("a", "tiny", {"inner": update})])
    x = torch.randn(2, 9, 4)
    base = model(x)
    with engine.activate([{"a": 1.0}, None]):
        live = model(x)
        assert call.CALL.get() is call.NO_CALL
        with pytest.raises(RuntimeError, match="injected"):
            model(torch.randn(2, 5, 4))
    assert call.CALL.get() is call.NO_CALL
    assert torch.equal(live[3:], base[3:])
    update_BTO = x.reshape(6, 3, 4)[:3] @ update.a_RI.T @ update.b_OR.T
    assert torch.allclose(live[:3], base[:3] + update_BTO, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pooled_rows_are_no_tokens_of_one_row():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, **sizes)).eval()
    model.name_or_path = "tiny"
    engine = Composer(model, [Adapter("a", "tiny", {"pooler.dense": Factors(torch.randn(2, 16), torch.randn(16, 2))})])
    weights = MixtureWeights(torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 4, 1, 1), ("a",))
    with (
        engine.activate(weights),
        pytest.raises(ScopeError, match=r"4 tokens, but the input of layer 'pooler\.dense' has 1"),
    ):
        model(input_ids=torch.randint(3, 60, (4, 4)))


@pytest.mark.parametrize("flattened", ["by the caller", "by the model"])
@torch.no_grad()
def test_tokens_in_one_axis_are_those_of_the_rows(flattened):
    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x.flatten(0, -2))

    torch.manual_seed(0)
    model, update = Flattening(), Factors(torch.randn(2, 4), torch.randn(4, 2))
    engine = Composer(model, [Adapter("a", "tiny", {"inner": update})])
    x_BTI, w_BT = torch.randn(2, 3, 4), torch.randn(2, 3)
    with engine.activate(MixtureWeights(w_BT.view(2, 3, 1, 1), ("a",))):
        live = model(x_BTI if flattened == "by the model" else x_BTI.flatten(0, 1))
    update_BTO = w_BT[..., None] * (x_BTI @ update.a_RI.T @ update.b_OR.T)
    assert torch.allclose(live, model(x_BTI) + update_BTO.flatten(0, 1), rtol=1e-5, atol=1e-5)


class Seeing(nn.Module):
    """Reads texts, and looks at images, of which a text may have any number, as llava does."""

    def __init__(self):
        super().__init__()
        self.embed, self.patch = nn.Embedding(9, 4), nn.Conv2d(3, 4, 2, stride=2)
        self.look, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids, pixel_values=None):
        seen = None if pixel_values is None else self.look(self.patch(pixel_values).flatten(2).mT)
        return self.read(self.embed(input_ids)), seen


SEEING = {"look": ((4, 4), "linear", ()), "patch": ((4, 12), "conv", (2, 2)), "read": ((4, 4), "linear", ())}


@pytest.mark.parametrize("layer", ["look", "patch"])
@torch.no_grad()
def test_images_that_are_not_one_for_each_text_take_no_weights_by_row(layer):
    torch.manual_seed(0)
    updates = {
        name: Factors(torch.randn(2, size[1]), torch.randn(size[0], 2), kind=kind, kernel=kernel)
        for name, (size, kind, kernel) in SEEING.items()
        if name in (layer, "read")
    }
    model = Seeing()
    engine = Composer(model, [Adapter("a", "tiny", updates)])
    ids, pixels = torch.randint(9, (4, 5)), torch.randn(4, 3, 4, 4)
    rows = [{"a": 1.0}, None]
    with engine.activate({"a": 1.0}):
        read, seen = model(input_ids=ids, pixel_values=pixels)
    base_read, base_seen = model(input_ids=ids, pixel_values=pixels)
    with engine.activate(rows):
        # twice, since the second call finds what the first has made
        for _ in range(2):
            found_read, found_seen = model(input_ids=ids, pixel_values=pixels)
        assert torch.allclose(found_read, torch.cat([read[:2], base_read[2:]]), atol=1e-6)
        assert torch.allclose(found_seen, torch.cat([seen[:2], base_seen[2:]]), atol=1e-6)
        with pytest.raises(ScopeError, match=f"layer '{layer}' has 4 rows in a call of 2 texts with images"):
            model(input_ids=ids[:2], pixel_values=pixels)
        assert torch.allclose(model(input_ids=ids[:2])[0], torch.cat([read[:1], base_read[1:2]]), atol=1e-6)
    with engine.activate(MixtureWeights(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1), ("a",), ("read",))):
        found_read, found_seen = model(input_ids=ids[:2], pixel_values=pixels)
    assert torch.allclose(found_read, torch.cat([read[:1], base_read[1:2]]), atol=1e-6)
    assert torch.equal(found_seen, base_seen)
