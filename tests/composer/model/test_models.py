"""Families of models, each a tiny random one: live mixtures against the installed peft, row by row, and against fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rounding import assert_near
from tiny_models import draw_model
from torch import Tensor, nn

from loraweave.composer.composer import Composer
from loraweave.composer.model.layers import tied_parameters
from loraweave.errors import CompositionError, LayerMismatch, ScopeError, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

NUM_ROWS = 3
# what peft and transformers say of each other, and of tiny models
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    # tiny models are on no model hub, where some versions of peft look for their vocabulary's size
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]


class Family(NamedTuple):
    auto: str
    settings: dict[str, Any]
    targets: tuple[str, ...]
    inputs: Callable[[], dict[str, Tensor]]


def text() -> dict[str, Tensor]:
    ids_BT = torch.randint(3, 60, (NUM_ROWS, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}


def text_to_text() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": text()["input_ids"][:, :4]}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(NUM_ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def text_with_image() -> dict[str, Tensor]:
    # the four patches of the row's image stand in its text
    images = torch.full((NUM_ROWS, 4), IMAGE_TOKEN)
    return {**pixels(), "input_ids": torch.cat([images, text()["input_ids"]], dim=1)}


def speech() -> dict[str, Tensor]:
    features = torch.randn(NUM_ROWS, 6, 16, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "decoder_input_ids": text()["input_ids"][:, :4]}


def waves() -> dict[str, Tensor]:
    return {"input_values": torch.randn(NUM_ROWS, 80, generator=torch.Generator().manual_seed(1))}


SPECIAL = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {**SPECIAL, **SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADS = {**DECODER, "head_dim": 4}
EXPERTS = {**HEADS, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}
EXPERTS |= {"num_experts": 4, "num_local_experts": 4}
SEQUENCES = {**SPECIAL, "d_model": 16, "decoder_start_token_id": 0}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
LAYERS |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
IMAGE_TOKEN = 60
TOWERS = {"text_config": {"model_type": "llama", **HEADS}, "image_token_index": IMAGE_TOKEN, "image_seq_length": 4}
TOWERS |= {"vision_config": {"model_type": "clip_vision_model", **SIZES, "image_size": 8, "patch_size": 4}}
WAVES = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 2), "num_feat_extract_layers": 2}
WAVES |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
LM, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
IMAGES = "AutoModelForImageClassification"
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
GATED = ("embed_tokens", "q_proj", "v_proj", "down_proj", "lm_head")

FAMILIES = {
    **dict.fromkeys(LIKE_LLAMA, Family(LM, HEADS, GATED, text)),
    "phi": Family(LM, DECODER, ("embed_tokens", "q_proj", "dense", "fc2", "lm_head"), text),
    "phi3": Family(LM, DECODER, ("embed_tokens", "qkv_proj", "gate_up_proj", "down_proj"), text),
    "gpt2": Family(
        LM,
        {**SPECIAL, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
        ("wte", "c_attn", "c_fc", "c_proj"),
        text,
    ),
    "gpt_neox": Family(LM, DECODER, ("embed_in", "query_key_value", "dense_4h_to_h"), text),
    "opt": Family(
        LM, {**SPECIAL, **SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}, ("embed_tokens", "k_proj", "fc1"), text
    ),
    "falcon": Family(LM, {**SPECIAL, **SIZES}, ("word_embeddings", "query_key_value", "dense_4h_to_h"), text),
    "bloom": Family(
        LM, {**SPECIAL, "hidden_size": 16, "n_layer": 2, "n_head": 2}, ("word_embeddings", "dense", "dense_h_to_4h"), text
    ),
    "mamba": Family(
        LM,
        {**SPECIAL, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        ("embeddings", "in_proj", "x_proj"),
        text,
    ),
    "mixtral": Family(LM, EXPERTS, ("embed_tokens", "q_proj", "o_proj", "lm_head"), text),
    "qwen2_moe": Family(LM, EXPERTS, ("q_proj", "shared_expert.down_proj", "shared_expert_gate"), text),
    "qwen3_moe": Family(LM, EXPERTS, ("k_proj", "o_proj", "lm_head"), text),
    "gpt_oss": Family(LM, EXPERTS, ("q_proj", "o_proj", "lm_head"), text),
    "t5": Family(
        SEQ2SEQ,
        {**SEQUENCES, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
        ("encoder.embed_tokens", "decoder.embed_tokens", "q", "v", "wo"),
        text_to_text,
    ),
    "bart": Family(
        SEQ2SEQ,
        {**SEQUENCES, **LAYERS, "scale_embedding": True, "max_position_embeddings": 64},
        ("encoder.embed_tokens", "decoder.embed_tokens", "q_proj", "fc2"),
        text_to_text,
    ),
    "whisper": Family(
        "AutoModelForSpeechSeq2Seq",
        {**SEQUENCES, **LAYERS, "num_mel_bins": 6, "max_source_positions": 8, "max_target_positions": 16},
        ("conv1", "conv2", "embed_tokens", "q_proj", "fc1"),
        speech,
    ),
    "bert": Family(
        "AutoModelForSequenceClassification",
        {**SPECIAL, **SIZES, "num_labels": 3},
        ("word_embeddings", "query", "value", "dense"),
        text,
    ),
    "roberta": Family("AutoModelForMaskedLM", {**SPECIAL, **SIZES}, ("word_embeddings", "query", "dense"), text),
    "distilbert": Family(
        "AutoModelForSequenceClassification",
        {**SPECIAL, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "num_labels": 3},
        ("word_embeddings", "q_lin", "lin2", "classifier"),
        text,
    ),
    "wav2vec2": Family("AutoModelForCTC", {**SPECIAL, **SIZES, **WAVES}, ("conv_layers.1.conv", "k_proj", "lm_head"), waves),
    "vit": Family(
        IMAGES, {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 3}, ("projection", "q_proj", "fc1"), pixels
    ),
    # in the text tower, the vision tower and between them
    "llava": Family(
        "AutoModelForImageTextToText",
        {**TOWERS, "vision_feature_layer": -1},
        ("linear_1", "q_proj", "fc1", "down_proj", "lm_head"),
        text_with_image,
    ),
    "swin": Family(
        IMAGES,
        {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
        | {"num_labels": 3},
        ("projection", "q_proj", "fc2", "reduction"),
        pixels,
    ),
    "resnet": Family(
        IMAGES,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3, "layer_type": "basic"},
        ("convolution", "classifier.1"),
        pixels,
    ),
    "convnext": Family(
        IMAGES,
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 3, "patch_size": 2},
        ("patch_embeddings", "downsampling_layer.1", "pwconv1", "pwconv2", "classifier"),
        pixels,
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def make(family: str) -> nn.Module:
    """A fresh model in eval mode, of weights that matter, the same at every call."""
    auto, settings = FAMILIES[family].auto, FAMILIES[family].settings
    config = transformers.AutoConfig.for_model(family, **settings)
    return draw_model(lambda: getattr(transformers, auto).from_config(config))  # type: ignore[no-any-return]


@torch.no_grad()
def output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    # without a cache: tiny encoder-decoders warn of it
    cached = {} if "pixel_values" in inputs or "input_values" in inputs else {"use_cache": False}
    return model(**inputs, **cached).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """family -> folders of two adapters "a" and "b" that peft has written, with different ranks and layers."""

    @cache
    def save(family: str) -> list[Path]:
        folders = []
        targets = FAMILIES[family].targets
        for seed, (name, rank, some) in enumerate((("a", 2, targets), ("b", 3, targets[1:]))):
            config = LoraConfig(r=rank, lora_alpha=3, target_modules=list(some))
            model = get_peft_model(make(family), config)  # type: ignore[arg-type]
            torch.manual_seed(seed)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = 0.4 * torch.randn_like(parameter)
            folders.append(tmp_path_factory.mktemp(family) / name)
            model.save_pretrained(str(folders[-1]), save_embedding_layers=False)
        return folders

    return save


def as_peft(family: str, folders: list[Path]) -> Any:
    model = PeftModel.from_pretrained(make(family), str(folders[0]), adapter_name="a").eval()
    model.load_adapter(str(folders[1]), "b")
    return model


def merged(family: str, folders: list[Path], weights: Mapping[str, float]) -> nn.Module:
    """The model with the weights that peft would merge, as parameters of their own, so that what is tied to one stays."""
    theirs = as_peft(family, folders)
    for module in theirs.base_model.model.modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.base_layer.weight.detach()
            for name in module.scaling:
                weight = weight + weights.get(name, 0.0) * module.get_delta_weight(name)
            module.base_layer.weight = nn.Parameter(weight)
    return theirs.unload()  # type: ignore[no-any-return]


def adapters(folders: list[Path]) -> dict[str, Adapter]:
    return {folder.name: Adapter.from_pretrained(folder) for folder in folders}


def near(found: Tensor, expected: Tensor) -> None:
    # at most eight products after one another in each of four layers, and the head's, of at most 24 inputs
    assert_near(found, expected, 24 * (8 * 4 + 1))


@every_family
def test_each_adapter_alone_equals_peft_and_leaving_is_the_base(family: str, saved: Callable[[str], list[Path]]) -> None:
    model, inputs = make(family), FAMILIES[family].inputs()
    base = output(model, inputs)
    theirs = as_peft(family, saved(family))
    engine = Composer(model, adapters(saved(family)))
    for name in "ab":
        if family == "whisper":
            # the encoder reads its convolutions' strides, which peft's wrapped layers do not have
            expected = output(merged(family, saved(family), {name: 1.0}), inputs)
        else:
            theirs.set_adapter(name)
            expected = output(theirs, inputs)
        assert float((expected - base).abs().max()) > 1e-2
        with engine.activate({name: 1.0}):
            near(output(model, inputs), expected)
    assert torch.equal(output(model, inputs), base)


@every_family
def test_a_batch_of_mixtures_equals_each_row_alone(family: str, saved: Callable[[str], list[Path]]) -> None:
    model, inputs = make(family), FAMILIES[family].inputs()
    rows = [{"a": 1.0}, None, {"a": 0.6, "b": -1.2}]
    engine = Composer(model, adapters(saved(family)))
    with engine.activate(rows):
        together = output(model, inputs)
    for number, row in enumerate(rows):
        with engine.activate(row or {}):
            alone = output(model, {name: tensor[number : number + 1] for name, tensor in inputs.items()})
        near(together[number : number + 1], alone)


@pytest.mark.parametrize("family", ["gemma", "gpt2", "mixtral", "t5", "bart"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_rows_with_mixtures_of_embeddings_too_generate_what_each_alone_does(
    num_beams: int, family: str, saved: Callable[[str], list[Path]]
) -> None:
    model, inputs = make(family), text()
    rows = [{"a": 1.0}, None, {"a": 0.6, "b": -1.2}]
    engine = Composer(model, adapters(saved(family)))
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": num_beams, "do_sample": False}
    with engine.activate(rows):
        together = model.generate(**inputs, **options)
    for number, row in enumerate(rows):
        with engine.activate(row or {}):
            alone = model.generate(**{name: tensor[number : number + 1] for name, tensor in inputs.items()}, **options)
        assert together[number].tolist() == alone[0].tolist()


@every_family
def test_a_mixture_equals_the_weights_that_peft_would_merge(family: str, saved: Callable[[str], list[Path]]) -> None:
    model, inputs = make(family), FAMILIES[family].inputs()
    with Composer(model, adapters(saved(family))).activate({"a": 0.7, "b": -0.4}):
        live = output(model, inputs)
    near(live, output(merged(family, saved(family), {"a": 0.7, "b": -0.4}), inputs))


@every_family
def test_fused_equals_live_or_names_the_tied_weight(family: str, saved: Callable[[str], list[Path]]) -> None:
    model, inputs = make(family), FAMILIES[family].inputs()
    own = adapters(saved(family))
    base = output(model, inputs)
    tied = set(tied_parameters(model))
    touched = {layer for layer in own["a"].layers if f"{layer}.weight" in tied}
    if touched:
        with pytest.raises(CompositionError, match=r"tied weights.*activate\(\)"), Composer(model, own).fused({"a": 1.0}):
            pass
        assert torch.equal(output(model, inputs), base)
        own = {"b": own["b"]} if touched.isdisjoint(own["b"].layers) else {}
    for name in own:
        engine = Composer(model, own)
        with engine.activate({name: 0.7}):
            live = output(model, inputs)
        with engine.fused({name: 0.7}):
            near(output(model, inputs), live)
    assert torch.equal(output(model, inputs), base)


@pytest.mark.parametrize("family", ["gpt2", "bert", "phi", "qwen2", "whisper", "vit"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_layers_and_norms_equal_pefts(bias: str, family: str, tmp_path: Path) -> None:
    inputs = FAMILIES[family].inputs()
    theirs = get_peft_model(make(family), LoraConfig(r=2, bias=bias, target_modules=[FAMILIES[family].targets[-1]]))  # type: ignore[arg-type]
    torch.manual_seed(3)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    expected = output(theirs.eval(), inputs)
    adapter = Adapter.from_pretrained(tmp_path)
    alone = [layer for layer, factors in adapter.layers.items() if not factors.rank]
    assert bool(alone) == (bias == "all")
    model = make(family)
    base = output(model, inputs)
    engine = Composer(model, {"a": adapter})
    with engine.activate({"a": 1.0}):
        near(output(model, inputs), expected)
    with engine.activate([{"a": 1.0}, None, {"a": 0.5}]):
        live = output(model, inputs)
    near(live[:1], expected[:1])
    assert torch.equal(live[1:2], base[1:2])
    with engine.activate({"a": 0.5}):
        near(output(model, inputs)[2:], live[2:])
    with engine.fused({"a": 1.0}):
        near(output(model, inputs), expected)
    assert torch.equal(output(model, inputs), base)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
def test_an_adapter_of_fused_experts_is_refused_with_the_way_out(family: str) -> None:
    model = make(family)
    layer = next(name for name, _ in model.named_modules() if name.endswith("experts"))
    # the second is where transformers 4 had the experts of mixtral
    for asked in (layer, "model.layers.0.block_sparse_moe.experts.1.w1", f"{layer}.0.down_proj"):
        update = Factors(torch.ones(2, 16), torch.ones(24, 2))
        with pytest.raises(LayerMismatch, match=r"weights of all its experts in 'gate_up_proj'.*merge the adapter"):
            Composer(model, [Adapter("a", "tiny", {asked: update})])


@pytest.mark.parametrize(
    ("family", "layer", "size", "message"),
    [
        ("mixtral", "model.layers.0.mlp.gate", (4, 16), "MixtralTopKRouter"),
        # an embedding that only holds the weight of others
        ("t5", "shared", (16, 61), r"never runs: .* to 'encoder\.embed_tokens'"),
        ("bart", "model.shared", (16, 61), r"never runs: .* to 'encoder\.embed_tokens'"),
    ],
)
def test_a_layer_that_an_update_cannot_change_is_refused(
    family: str, layer: str, size: tuple[int, int], message: str
) -> None:
    update = Factors(torch.ones(1, size[1]), torch.ones(size[0], 1), kind="embedding" if size[1] == 61 else "linear")
    with pytest.raises(LayerMismatch, match=message):
        Composer(make(family), [Adapter("a", "tiny", {layer: update})])


@pytest.mark.parametrize(
    ("family", "layer", "size"),
    [
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", (2, 32)),
        ("gpt2", "transformer.wpe", (16, 64)),
        ("bert", "bert.embeddings.token_type_embeddings", (16, 2)),
    ],
)
def test_an_embedding_of_no_tokens_takes_one_mixture_for_all_rows(family: str, layer: str, size: tuple[int, int]) -> None:
    model, inputs = make(family), FAMILIES[family].inputs()
    torch.manual_seed(0)
    update = Factors(torch.randn(2, size[1]), torch.randn(size[0], 2), kind="embedding")
    engine = Composer(model, [Adapter("a", "tiny", {layer: update})])
    base = output(model, inputs)
    with engine.activate({"a": 1.0}):
        live = output(model, inputs)
    with engine.fused({"a": 1.0}):
        near(live, output(model, inputs))
    assert float((live - base).abs().max()) > 1e-2
    one_row = MixtureWeights(torch.ones(1, 1, 1, 1), ("a",))
    for mixture in ([{"a": 1.0}, None, None], [one_row, None, {}], MixtureWeights(torch.ones(1, 6, 1, 1), ("a",))):
        with pytest.raises(ScopeError, match=f"'{layer}'.*'a' updates, is not an embedding of tokens"):
            engine.activate(mixture)
    assert not engine.active
    elsewhere = MixtureWeights(torch.ones(3, 1, 1, 1), ("a",), ("another",))
    with pytest.raises(WeightingError, match="another"):
        engine.activate(elsewhere)


# in a list, and in a dictionary as switch_transformers and nllb_moe have them
@pytest.mark.parametrize("name", ["0", "expert_0"])
def test_an_expert_among_modules_takes_one_mixture_for_all_rows(name: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4))})

    update = Factors(torch.ones(1, 4), torch.ones(4, 1))
    engine = Composer(Experts(), [Adapter("a", "tiny", {f"experts.{name}.0": update})])
    with pytest.raises(ScopeError, match="tokens that are routed to it"):
        engine.activate([{"a": 1.0}, None])
    with engine.activate({"a": 1.0}):
        pass


@pytest.mark.parametrize("layer", ["model.embed_tokens", "lm_head"])
def test_an_adapter_of_one_of_two_tied_uses_changes_only_that_one_as_in_peft(layer: str, tmp_path: Path) -> None:
    wrapped = get_peft_model(make("gemma"), LoraConfig(r=2, target_modules=[layer]))  # type: ignore[arg-type]
    torch.manual_seed(0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = 0.4 * torch.randn_like(parameter)
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=False)
    model, inputs = make("gemma"), text()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    hidden: list[Tensor] = []
    handle = model.model.register_forward_hook(lambda module, args, out: hidden.append(out.last_hidden_state))
    base = output(model, inputs)
    with Composer(model, {"a": Adapter.from_pretrained(tmp_path)}).activate({"a": 1.0}):
        found = output(model, inputs)
    handle.remove()
    near(found, output(wrapped.eval(), inputs))
    # what lies before the head is untouched by an adapter of the head alone
    assert torch.equal(hidden[0], hidden[1]) == (layer == "lm_head")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(output(model, inputs), base)


def test_the_page_on_models_names_every_family() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    assert [family for family in FAMILIES if f"`{family}`" not in page] == []
