"""Tiny random transformers of every kind, and random adapters for them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loraweave as lw
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

# what the fixtures that make models and adapters are, in signatures of tests
Make = Callable[..., Any]


def _llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
        )
    )


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=61,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        )
    )


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3
        )
    )


def _bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=61,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )


def _segformer(**changes: Any) -> nn.Module:
    """Dense prediction on images of 3 channels: two stages, convolutions of stride 2 and of one pixel."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    settings = {
        "num_encoder_blocks": 2,
        "depths": [2, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [8, 16],
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 8,
        "num_labels": 4,
        "drop_path_rate": 0.0,
        "classifier_dropout_prob": 0.0,
    }
    return SegformerForSemanticSegmentation(SegformerConfig(**{**settings, **changes}))


def _upernet(**changes: Any) -> nn.Module:
    """Dense prediction with Swin's windows, and convolutions of 3 by 3 in the decoder."""
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = SwinConfig(
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[1, 2],
        window_size=4,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2"],
    )
    settings = {"hidden_size": 8, "pool_scales": [1, 2], "use_auxiliary_head": False, "num_labels": 4}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **{**settings, **changes}))


MODELS = {
    "llama": _llama,
    "gpt2": _gpt2,
    "t5": _t5,
    "bert": _bert,
    "bart": _bart,
    "segformer": _segformer,
    "upernet": _upernet,
}
TARGETS = {
    "llama": ("q_proj", "v_proj", "down_proj", "lm_head"),
    "gpt2": ("c_attn", "c_fc", "c_proj"),
    "t5": ("q", "v", "wo"),
    "bert": ("query", "value", "dense"),
}


def draw_model(make: Callable[[], Any]) -> Any:
    """The model that `make` builds, in eval mode, with the same random weights at every call."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        model = make()
        # the usual initialisation is so small that half the layers would not be seen in the output
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    model.name_or_path = "tiny"
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    """make_model("llama", dtype=...): a fresh model in eval mode, of weights that matter, the same at every call."""

    def make(kind: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
        model = draw_model(lambda: MODELS[kind](**changes))
        for part in model.modules():
            # what the adapters below name as their base
            part.name_or_path = "tiny"
        return model.to(dtype)

    return make


def _tiny(kind: str) -> Any:
    @pytest.fixture(name=f"tiny_{kind}")
    def tiny(share_in_session: Make, make_model: Make) -> nn.Module:
        return share_in_session(kind, lambda: make_model(kind))

    return tiny


tiny_llama, tiny_gpt2, tiny_t5, tiny_bert = map(_tiny, ("llama", "gpt2", "t5", "bert"))


@pytest.fixture(scope="session")
def cache_argument() -> Callable[[nn.Module], str]:
    """What this version of transformers calls the argument that takes a cache."""
    return lambda model: "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def linear_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(O, I) of every linear layer whose last name is among `targets`."""
    found = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in targets and hasattr(module, "weight") and module.weight.dim() == 2:
            rows, columns = module.weight.shape
            found[name] = (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)
    return found


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Adapter]:
    """make_adapter(model, name, rank=..., targets=..., seed=...): random factors of size one half on the named layers."""

    def make(
        model: nn.Module,
        name: str,
        *,
        rank: int = 3,
        targets: Sequence[str] = ("q_proj", "v_proj"),
        seed: int = 0,
        bias: bool = False,
        gain: bool = False,
    ) -> Adapter:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) * 0.5

        layers = {
            layer: Factors(
                random(rank, num_in),
                random(num_out, rank),
                gain_O=random(num_out) if gain else None,
                bias_O=random(num_out) if bias else None,
            )
            for layer, (num_out, num_in) in linear_layers(model, targets).items()
        }
        return Adapter(name, "tiny", layers)

    return make


@pytest.fixture(scope="session")
def make_adapters(make_adapter: Callable[..., Adapter]) -> Callable[[nn.Module, str], list[Adapter]]:
    """Three adapters "a", "b", "c" for a model of a kind, with different ranks and layers."""

    def make(model: nn.Module, kind: str) -> list[Adapter]:
        targets = TARGETS[kind]
        return [
            make_adapter(model, "a", rank=1, targets=targets[:2], seed=1),
            make_adapter(model, "b", rank=4, targets=targets[1:], seed=2),
            make_adapter(model, "c", rank=3, targets=targets, seed=3),
        ]

    return make


def _set_dense(model: nn.Module, updates: dict[str, tuple[Tensor, Tensor | None]]) -> None:
    with torch.no_grad():
        for name, (dense_OI, bias_O) in updates.items():
            module = model.get_submodule(name)
            transposed = type(module).__name__ == "Conv1D"
            module.weight.copy_(dense_OI.T if transposed else dense_OI)
            if bias_O is not None:
                module.bias.copy_(bias_O)


@pytest.fixture(scope="session")
def with_dense_update(make_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A fresh model whose weights are W + sum of w_e b_e a_e, written out densely in float64: the formula itself."""

    def make(
        kind: str, adapters: Sequence[Adapter], weights: Sequence[float], *, dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        model = make_model(kind, dtype=dtype)
        updates = {}
        for name in sorted({layer for adapter in adapters for layer in adapter.layers}):
            module = model.get_submodule(name)
            weight = module.weight.detach().double()
            base_OI = weight.T if type(module).__name__ == "Conv1D" else weight
            dense_OI, bias_O = base_OI.clone(), None if module.bias is None else module.bias.detach().double().clone()
            for adapter, w in zip(adapters, weights, strict=True):
                if name in adapter.layers:
                    factors = adapter.layers[name]
                    dense_OI += w * factors.b_OR.double() @ factors.a_RI.double()
                    if factors.gain_O is not None:
                        dense_OI += w * factors.gain_O.double()[:, None] * base_OI
                    if factors.bias_O is not None:
                        bias_O += w * factors.bias_O.double()
            updates[name] = (dense_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))
        _set_dense(model, updates)
        return model

    return make


def tokens_of(known: Sequence[str], **special: str) -> Any:
    """A fast tokenizer with these tokens, each a character or special, in the order of their ids."""
    from tokenizers import Regex, Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({token: index for index, token in enumerate(known)}, unk_token=special["unk_token"]))
    inner.pre_tokenizer = Split(Regex(r"</s>|[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A token for each character of small texts, 58 in all; ids below 3 are padding, beginning and end."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tokens_of([*special.values(), *"abcdefghijklmnopqrstuvwxyzABCDEFINOPRUY0123456789 \n:,.?"], **special)


@pytest.fixture(scope="session")
def base(tmp_path_factory: Any, make_model: Callable[..., nn.Module], tokenizer: Any) -> Any:
    """A folder with a tiny Llama and its tokenizer, as `--base` takes it."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save_pretrained(folder)
    make_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def model(tiny_llama: nn.Module) -> nn.Module:
    return tiny_llama


@pytest.fixture
def pool(share_in_session: Make, tiny_llama: nn.Module, make_adapters: Make) -> lw.ExpertPool:
    return share_in_session("pool of the llama", lambda: lw.ExpertPool(make_adapters(tiny_llama, "llama")))


@pytest.fixture
def engine(model: nn.Module, pool: lw.ExpertPool, tokenizer: Any) -> lw.Composer:
    return lw.Composer(model, pool, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def trained() -> Callable[[Any], Any]:
    """trained(expert_model): itself, with experts and gates that differ from those at the beginning."""

    def differ(made: Any) -> Any:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for value in made.expert_parameters().values():
                value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
        return made

    return differ


def model_inputs(kind: str, rows: int = 3, tokens: int = 7, seed: int = 5) -> dict[str, Tensor]:
    """Random tokens for a tiny model of that kind, without padding."""
    ids = torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "decoder_input_ids": ids[:, :4]} if kind == "t5" else batch


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits  # type: ignore[no-any-return]


def random_factors(
    seed: int | torch.Generator,
    rank: int = 3,
    num_out: int = 5,
    num_in: int = 7,
    *,
    scale: float = 1.0,
    **parts: Any,
) -> Factors:
    """Return an update of normal a and `scale` times normal b, the same for the same seed; `parts` are further fields."""
    draw = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    a_RI, b_OR = torch.randn(rank, num_in, generator=draw), torch.randn(num_out, rank, generator=draw)
    return Factors(a_RI, scale * b_OR, **parts)


def random_adapter(
    name: str, layers: Mapping[str, tuple[int, int, int]], seed: int = 0, *, base_model: str = "tiny", **fields: Any
) -> Adapter:
    """Return an adapter of random factors; `layers` maps each path to (rank, inputs, outputs), `fields` are further ones."""
    draw = torch.Generator().manual_seed(seed)
    factors = {layer: random_factors(draw, rank, num_out, num_in) for layer, (rank, num_in, num_out) in layers.items()}
    return Adapter(name, base_model, factors, **fields)


def dense(update: Any) -> Tensor:
    """The update as (O, I) in float64, whatever a merge method gave it as; dense_array is the same for numpy."""
    held = getattr(update, "factors", update)
    return held.delta_OI.double() if hasattr(held, "delta_OI") else held.b_OR.double() @ held.a_RI.double()


def dense_array(update: Any) -> Any:
    return dense(update).numpy()


def write_tiny_base(folder: Any, *, dtype: torch.dtype = torch.float32, pad: bool = False) -> nn.Module:
    """A random llama of five words with its tokenizer, written to a folder; returns the model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "<pad>": 4}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>"} if pad else {}
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **special
    ).save_pretrained(folder)
    torch.manual_seed(0)
    model = _llama(vocab_size=5, num_hidden_layers=1, num_key_value_heads=4, pad_token_id=None).to(dtype)
    model.save_pretrained(folder)
    return model
