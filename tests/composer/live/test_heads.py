"""Trained heads mix, fuse and differ by row as peft applies them."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import loraweave as lw
from loraweave.errors import AdapterUnsupported, CompositionError, LayerMismatch

pytestmark = pytest.mark.filterwarnings(
    "ignore::loraweave.errors.BaseModelUnverified", "ignore::UserWarning", "ignore::FutureWarning:transformers.*"
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = {"input_ids": torch.tensor([[5, 9, 7, 3], [4, 8, 30, 2], [60, 1, 2, 11]])}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 3 * 8 * 8).reshape(3, 3, 8, 8)}
CASES = {
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(vocab_size=61, num_labels=3, **SIZES)),
        ["query", "value"],
        ["classifier"],
        IDS,
    ),
    "vit": (
        lambda: ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=20, **SIZES)),
        ["q_proj", "v_proj"],
        ["classifier"],
        PIXELS,
    ),
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(vocab_size=61, tie_word_embeddings=False, **SIZES)),
        ["q_proj", "v_proj"],
        ["lm_head", "embed_tokens"],
        IDS,
    ),
    "tied": (
        lambda: LlamaForCausalLM(LlamaConfig(vocab_size=61, tie_word_embeddings=True, **SIZES)),
        ["q_proj", "v_proj"],
        ["lm_head"],
        IDS,
    ),
}


def make_base(case):
    torch.manual_seed(1)
    return CASES[case][0]().eval()


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    """(case, {name: adapter}, {name: peft's logits}) of two adapters with their own heads, as peft saves them."""
    _, targets, heads, inputs = CASES[request.param]
    adapters, logits = {}, {}
    for seed, name in enumerate("ab"):
        model = make_base(request.param)
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=targets, modules_to_save=heads, init_lora_weights=False)
        model = get_peft_model(model, config).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "modules_to_save" in path:
                    parameter += 0.3 * torch.randn_like(parameter)
            logits[name] = model(**inputs).logits
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        adapters[name] = lw.Adapter.from_pretrained(folder, name=name)
        assert adapters[name].heads
    return request.param, adapters, logits


def answer(model, case):
    with torch.no_grad():
        return model(**CASES[case][3]).logits


def test_one_adapter_answers_with_its_head_as_in_peft(trained):
    case, adapters, expected = trained
    model = make_base(case)
    engine = lw.Composer(model, adapters.values())
    for name, logits in expected.items():
        with engine.activate({name: 1.0}):
            torch.testing.assert_close(answer(model, case), logits, rtol=1e-5, atol=1e-5)


def test_each_row_has_the_head_of_its_own_adapter(trained):
    case, adapters, expected = trained
    model = make_base(case)
    base = answer(model, case)
    with lw.Composer(model, adapters.values()).activate([{"a": 1.0}, {"b": 1.0}, None]):
        found = answer(model, case)
    torch.testing.assert_close(found, torch.stack([expected["a"][0], expected["b"][1], base[2]]), rtol=1e-5, atol=1e-5)
    assert torch.equal(answer(model, case), base)


def test_weights_add_up_the_differences_to_the_bases_head(trained):
    case, adapters, _ = trained
    model, mixed = make_base(case), make_base(case)
    merged = {name: replace(adapter, heads={}) for name, adapter in adapters.items()}
    with torch.no_grad():
        if case == "tied":
            mixed.lm_head.weight = torch.nn.Parameter(mixed.lm_head.weight.clone())
        own = dict(mixed.named_parameters())
        before = {name: parameter.clone() for name, parameter in own.items()}
        for weight, adapter in ((0.5, adapters["a"]), (0.25, adapters["b"])):
            for name, head in adapter.heads.items():
                own[name] += weight * (head - before[name])
    weights = {"a": 0.5, "b": 0.25}
    with lw.Composer(mixed, merged.values()).activate(weights):
        expected = answer(mixed, case)
    with lw.Composer(model, adapters.values()).activate(weights):
        torch.testing.assert_close(answer(model, case), expected, rtol=1e-5, atol=1e-5)


def test_fusing_writes_the_head_and_puts_the_base_back_bit_for_bit(trained):
    case, adapters, expected = trained
    model = make_base(case)
    engine = lw.Composer(model, adapters.values())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if case == "tied":
        with pytest.raises(CompositionError, match="tied weights"), engine.fused({"a": 1.0}):
            pass
    else:
        with engine.fused({"a": 1.0}):
            torch.testing.assert_close(answer(model, case), expected["a"], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_changed_base_head_is_noticed(trained):
    case, adapters, _ = trained
    model = make_base(case)
    engine = lw.Composer(model, adapters.values())
    head = next(iter(adapters["a"].heads))
    with torch.no_grad():
        dict(model.named_parameters(remove_duplicate=False))[head].add_(1.0)
    with pytest.raises(CompositionError, match=r"has changed since expert 'a'.*trained bias or head"):
        engine.activate({"a": 1.0}).__enter__()


@pytest.mark.parametrize(
    ("heads", "error", "said"),
    [
        ({"score.weight": torch.ones(3, 16)}, LayerMismatch, "'score', which the model does not have"),
        ({"lm_head.weight": torch.ones(60, 16)}, LayerMismatch, r"\(60, 16\), and the model's \(61, 16\)"),
        ({"lm_head.bias": torch.ones(61)}, LayerMismatch, r"bias has shape \(61,\), and the model's none"),
        ({"model.norm.weight": torch.ones(16)}, AdapterUnsupported, "RMSNorm with weight: only"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.ones(16, 16)}, AdapterUnsupported, "update of the same module"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_by_name(tiny_llama, make_adapter, heads, error, said):
    headed = replace(make_adapter(tiny_llama, "a"), heads=heads)
    with pytest.raises(error, match=f"'a' has a trained head for .*{said}"):
        lw.Composer(tiny_llama, [headed])
