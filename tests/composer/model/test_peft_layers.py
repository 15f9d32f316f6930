"""Parity of embeddings and convolutions with the installed peft, where peft's live form is that of its merged weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from loraweave.composer.composer import Composer
from loraweave.composer.merge.merge import merge
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

TOKENS = torch.randint(19, (3, 6, 9), generator=torch.Generator().manual_seed(3))


class Mixed(nn.Module):
    """Embeddings, plain and scaled, then convolutions of one, two and three dimensions, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(19, 4, padding_idx=1)
        self.scaled = Gemma3TextScaledWordEmbedding(19, 4, 0, embed_scale=1.5)
        self.conv1 = nn.Conv1d(4, 5, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=1)
        self.pixel = nn.Conv2d(5, 4, 1, bias=False)
        self.conv3 = nn.Conv3d(4, 5, 2)
        self.head = nn.Linear(5, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = (self.emb(tokens) + self.scaled(tokens)).permute(0, 3, 1, 2)
        pixels = self.pixel(torch.tanh(self.conv2(x)))
        depth = self.conv3(torch.stack([pixels, pixels.flip(2)], dim=2))
        line = self.conv1(x.flatten(2))
        return self.head(torch.tanh(depth).flatten(2).mT) + self.head(torch.tanh(line).mT).mean(dim=1, keepdim=True)


LAYERS = ["emb", "scaled", "conv1", "conv2", "pixel", "conv3", "head"]


def base() -> nn.Module:
    torch.manual_seed(0)
    model = Mixed().eval()
    # peft looks among the model's own attributes
    model.name_or_path = "tiny"  # type: ignore[assignment]
    return model


def trained(folder: Path, seed: int, **options: Any) -> Path:
    """A folder that peft has written, of an adapter with random values in all that it trains."""
    options = {"target_modules": LAYERS, **options}
    model = get_peft_model(base(), LoraConfig(**options))  # type: ignore[arg-type]
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    with warnings.catch_warnings():
        # a model of no model hub, where peft looks for its vocabulary's size
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


OPTIONS = {
    "plain": {"r": 3, "lora_alpha": 5},
    "DoRA": {"r": 2, "use_dora": True},
    # peft has no bias beside an embedding's factors, and merges none into a layer that lacks one
    "biases of the updates": {"r": 2, "lora_bias": True, "target_modules": ["conv1", "conv2", "conv3", "head"]},
    "trained biases": {"r": 2, "bias": "all"},
    "trained biases beside DoRA": {"r": 2, "bias": "lora_only", "use_dora": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@torch.no_grad()
def test_one_adapter_live_fused_and_saved_again_equals_peft(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = PeftModel.from_pretrained(base(), str(trained(tmp_path / "theirs", 1, **options))).eval()
    expected = theirs(TOKENS)
    adapter = Adapter.from_pretrained(tmp_path / "theirs")
    model = base()
    before = model(TOKENS)
    engine = Composer(model, {"a": adapter})
    with engine.activate({"a": 1.0}):
        assert_near(model(TOKENS), expected)
    with engine.fused({"a": 1.0}):
        assert_near(model(TOKENS), expected)
    assert torch.equal(model(TOKENS), before)
    assert float((expected - before).abs().max()) > 0.1
    adapter.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()
    assert_near(again(TOKENS), expected)


@torch.no_grad()
def test_a_weighted_mix_equals_pefts_cat(tmp_path: Path) -> None:
    folders = [trained(tmp_path / name, seed, r=rank) for seed, (name, rank) in enumerate((("a", 2), ("b", 3)))]
    theirs = PeftModel.from_pretrained(base(), str(folders[0]), adapter_name="a").eval()
    theirs.load_adapter(str(folders[1]), "b")
    model = base()
    with Composer(model, {folder.name: Adapter.from_pretrained(folder) for folder in folders}).activate(
        [{"a": 1.0}, {"a": 0.7, "b": 0.3}, None]
    ):
        found = model(TOKENS)
    theirs.set_adapter("a")
    assert_near(found[:1], theirs(TOKENS[:1]))
    assert torch.equal(found[2:], model(TOKENS)[2:])
    for layer in LAYERS:
        # peft's `cat` knows no convolutions, so that the sum is written into its factors
        module = theirs.base_model.model.get_submodule(layer)
        delta = 0.7 * module.get_delta_weight("a") + 0.3 * module.get_delta_weight("b")
        module.base_layer.weight += delta
    with theirs.disable_adapter():
        assert_near(found[1:2], theirs(TOKENS[1:2]))


@torch.no_grad()
def test_a_live_mixture_equals_the_merged_adapter_that_peft_reloads(tmp_path: Path) -> None:
    own = [Adapter.from_pretrained(trained(tmp_path / name, seed, r=3)) for seed, name in enumerate("ab")]
    model = base()
    with Composer(model, own).activate({"a": 0.7, "b": -0.4}):
        live = model(TOKENS)
    merged = merge(own, [0.7, -0.4], name="m")
    with Composer(model, [merged]).activate({"m": 1.0}):
        assert_near(model(TOKENS), live)
    reloaded = PeftModel.from_pretrained(base(), str(merged.export(tmp_path / "out").folder)).eval()
    assert_near(reloaded(TOKENS), live)


@torch.no_grad()
def test_peft_leaves_out_the_dilation_and_padding_mode_that_its_merged_weight_has() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=2, dilation=2, padding_mode="circular"))
    x = torch.randn(1, 2, 6, 6)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["0"], init_lora_weights=False))  # type: ignore[arg-type]
    factors = wrapped.base_model.model[0]
    with pytest.raises(RuntimeError, match="must match"):
        wrapped(x)
    a, b = factors.lora_A["default"].weight.detach(), factors.lora_B["default"].weight.detach()
    own = Factors(a.flatten(1).clone(), b.flatten(1) * factors.scaling["default"], kind="conv", kernel=(3, 3))
    wrapped.merge_adapter()
    merged = wrapped(x)
    wrapped.unmerge_adapter()
    plain = wrapped.unload()
    with Composer(plain, [Adapter("a", "tiny", {"0": own})]).activate({"a": 1.0}):
        assert_near(plain(x), merged)
