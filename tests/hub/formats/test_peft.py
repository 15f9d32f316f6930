"""PEFT folders against the installed peft: what it computes must be what the factors say, and what we write it must load."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from loraweave.hub.adapter import Adapter
from loraweave.hub.formats.peft import Peft
from loraweave.lowrank import algebra

# peft 0.21 asks transformers for an attribute that has been renamed there
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])


class Mixed(nn.Module):
    """An embedding, two convolutions and a linear layer in a row."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(17, 6)
        self.conv1 = nn.Conv1d(6, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 3, (3, 2), padding=1, bias=False)
        self.head = nn.Linear(5, 4)

    def forward(self, x_BT):
        y_BDT = self.conv1(self.emb(x_BT).transpose(1, 2))
        z = self.conv2(y_BDT[:, None])
        return self.head(y_BDT.transpose(1, 2)) + z.mean()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=29,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        attention_bias=True,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=29, n_embd=24, n_layer=2, n_head=2, n_positions=16)).eval()


def mixed():
    torch.manual_seed(0)
    return Mixed().eval()


BASES = {"llama": llama, "gpt2": gpt2, "mixed": mixed}

CASES = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "odd alpha": ("llama", {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\..*(q|k)_proj": 5},
            "alpha_pattern": {r"^model.layers.0.self_attn.q_proj": 3, "mlp.down_proj": 16},
        },
    ),
    "rslora with patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "dora": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "lora_bias": ("llama", {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"], "lora_bias": True}),
    "bias all": ("llama", {"r": 2, "target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": ("llama", {"r": 2, "target_modules": ["q_proj", "k_proj"], "bias": "lora_only"}),
    "layers_to_transform": (
        "llama",
        {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "excluded": (
        "llama",
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "regular expression": ("llama", {"r": 2, "target_modules": r".*layers\.[01]\.self_attn\.(q|o)_proj"}),
    "all-linear": ("llama", {"r": 2, "target_modules": "all-linear"}),
    "head by its short name": ("llama", {"r": 2, "target_modules": ["lm_head", "q_proj"]}),
    "gaussian": ("llama", {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "conv1d of gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "dora on conv1d of gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "embedding": ("mixed", {"r": 3, "lora_alpha": 5, "target_modules": ["emb", "head"]}),
    "convolutions": ("mixed", {"r": 2, "lora_alpha": 5, "target_modules": ["conv1", "conv2", "head"]}),
    "dora on an embedding": ("mixed", {"r": 3, "lora_alpha": 5, "target_modules": ["emb", "head"], "use_dora": True}),
    "dora on convolutions": ("mixed", {"r": 2, "lora_alpha": 5, "target_modules": ["conv1", "conv2"], "use_dora": True}),
    "lora_bias on a convolution": ("mixed", {"r": 2, "target_modules": ["conv1", "head"], "lora_bias": True}),
}


def train(model):
    """Random values in everything that peft would train, so that no part of the update is zero."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def output(model, base):
    with torch.no_grad():
        return model(TOKENS) if base == "mixed" else model(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (base, folder, what peft makes of the folder), made on first use."""
    made = {}

    def make(name):
        if name not in made:
            base, options = CASES[name]
            model = train(peft.get_peft_model(BASES[base](), peft.LoraConfig(**options)))
            folder = tmp_path_factory.mktemp("adapter")
            with warnings.catch_warnings():
                # tiny models exist on no model hub, where peft looks for their vocabulary's size
                warnings.simplefilter("ignore")
                model.save_pretrained(folder, save_embedding_layers=False)
            made[name] = base, folder, peft.PeftModel.from_pretrained(BASES[base](), folder).eval()
        return made[name]

    return make


def tuned_layers(model):
    prefix = "base_model.model."
    named = model.named_modules()
    return {name.removeprefix(prefix): module for name, module in named if isinstance(module, peft.tuners.lora.LoraLayer)}


def written(folder, target, **options):
    return Peft.write(Peft.read(folder), target, **options)


@pytest.mark.parametrize("name", [name for name in CASES if "dora" not in name])
def test_delta_of_every_layer_is_pefts(saved, name):
    base, folder, model = saved(name)
    layers = Peft.read(folder).layers
    tuned = tuned_layers(model)
    assert {layer for layer, factors in layers.items() if factors.rank} == set(tuned)
    for layer, module in tuned.items():
        delta_OI = (layers[layer].b_OR @ layers[layer].a_RI).detach()
        theirs = module.get_delta_weight("default").detach()
        if base == "gpt2" or layers[layer].kind == "embedding":
            theirs = theirs.T
        torch.testing.assert_close(delta_OI, theirs.reshape(delta_OI.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["dora", "dora on conv1d of gpt2"])
def test_bound_dora_changes_a_layers_output_as_peft_does(saved, name):
    base, folder, model = saved(name)
    x_TI = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    for layer, module in tuned_layers(model).items():
        weight_OI = module.base_layer.weight if base == "llama" else module.base_layer.weight.T
        bias_O = module.base_layer.bias if module.base_layer.bias is not None else torch.zeros(weight_OI.shape[0])
        bound = algebra.bind(Peft.read(folder).layers[layer], weight_OI, bias_O)
        with torch.no_grad():
            y0_TO = x_TI @ weight_OI.T
            ours_TO = y0_TO + bias_O + (x_TI @ bound.a_RI.T) @ bound.b_OR.T + bound.gain_O * y0_TO
            torch.testing.assert_close(ours_TO, module(x_TI), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lora_bias", "lora_bias on a convolution"])
def test_bias_of_lora_b_is_scaled_like_the_update(saved, name):
    _, folder, model = saved(name)
    for layer, module in tuned_layers(model).items():
        theirs_O = module.lora_B["default"].bias.detach() * module.scaling["default"]
        torch.testing.assert_close(Peft.read(folder).layers[layer].bias_O, theirs_O)


def test_trained_biases_of_every_layer_are_read_as_they_are(saved):
    _, folder, model = saved("bias all")
    layers = Peft.read(folder).layers
    named = {name: p for name, p in model.get_base_model().named_parameters() if name.endswith(".bias")}
    assert len(named) == 8
    for name, parameter in named.items():
        layer = name.removesuffix(".bias").removesuffix(".base_layer")
        assert torch.equal(layers[layer].base_bias_O, parameter.detach())


def test_layer_with_a_trained_bias_alone_has_rank_zero(saved):
    factors = Peft.read(saved("bias all")[1]).layers["model.layers.0.self_attn.v_proj"]
    assert factors.rank == 0
    assert factors.b_OR.shape == (24, 0)


@pytest.mark.parametrize("name", CASES)
def test_written_folder_gives_pefts_logits_again(saved, name, tmp_path):
    base, folder, model = saved(name)
    written(folder, tmp_path / "out")
    # a missing key would be a warning, and warnings are errors
    again = peft.PeftModel.from_pretrained(BASES[base](), tmp_path / "out").eval()
    torch.testing.assert_close(output(again, base), output(model, base), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_peft_finds_no_missing_and_no_unexpected_key_in_a_written_folder(saved, name, tmp_path):
    base, folder, model = saved(name)
    written(folder, tmp_path / "out")
    tensors = peft.utils.load_peft_weights(str(tmp_path / "out"), device="cpu")
    fresh = peft.get_peft_model(BASES[base](), peft.LoraConfig.from_pretrained(tmp_path / "out"))
    result = peft.set_peft_model_state_dict(fresh, tensors)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    assert set(tuned_layers(fresh)) == set(tuned_layers(model))


@pytest.mark.parametrize("name", CASES)
def test_reading_a_written_folder_gives_the_same_hash(saved, name, tmp_path):
    _, folder, _ = saved(name)
    contents = Peft.read(folder)
    again = Peft.read(Peft.write(contents, tmp_path / "out"))
    first, second = (Adapter("x", "base", content.layers) for content in (contents, again))
    assert first.hash == second.hash


def test_first_of_several_matching_alpha_patterns_decides_and_a_warning_tells(tmp_path):
    alphas = {"down_proj": 1, "mlp.down_proj": 16}
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["down_proj"], alpha_pattern=alphas)
    train(peft.get_peft_model(llama(), config)).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.warns(UserWarning, match="PEFT sorts the entries"):
        layers = Peft.read(tmp_path).layers
    model = peft.PeftModel.from_pretrained(llama(), tmp_path)
    for layer, module in tuned_layers(model).items():
        torch.testing.assert_close(algebra.delta(layers[layer]), module.get_delta_weight("default").detach())


def test_scale_that_is_a_power_of_two_is_exact(saved):
    _, folder, model = saved("plain")
    for layer, module in tuned_layers(model).items():
        assert torch.equal(Peft.read(folder).layers[layer].b_OR, module.lora_B["default"].weight.detach() * 2)


def test_embedding_keeps_its_kind(saved):
    factors = Peft.read(saved("embedding")[1]).layers["emb"]
    assert (factors.kind, factors.a_RI.shape, factors.b_OR.shape) == ("embedding", (3, 17), (6, 3))


def test_convolution_keeps_its_kernel(saved):
    layers = Peft.read(saved("convolutions")[1]).layers
    assert (layers["conv1"].kernel, layers["conv1"].a_RI.shape) == ((3,), (2, 18))
    assert (layers["conv2"].kernel, layers["conv2"].a_RI.shape) == ((3, 2), (2, 6))


def test_fan_in_fan_out_is_recorded_and_put_back(saved, tmp_path):
    contents = Peft.read(saved("conv1d of gpt2")[1])
    assert contents.card["peft"]["fan_in_fan_out"] is True
    config = json.loads((Peft.write(contents, tmp_path / "out") / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True


def test_half_precision_option_rounds_and_is_read_back_in_fp32(saved, tmp_path):
    _, folder, _ = saved("plain")
    contents = Peft.read(folder)
    again = Peft.read(written(folder, tmp_path / "out", dtype=torch.float16))
    assert again.card["stored_dtype"] == "float16"
    for layer, factors in contents.layers.items():
        assert torch.equal(again.layers[layer].b_OR, factors.b_OR.half().float())


def test_saved_embedding_next_to_its_update_is_refused_with_the_way_out(tmp_path):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="save_embedding_layers=False"):
        Peft.read(tmp_path)


@pytest.mark.parametrize("style", ["prefix missing", "prefix doubled", "adapter name inside"])
def test_keys_of_every_age_mean_the_same_layers(saved, style, tmp_path):
    _, folder, _ = saved("dora")
    prefix = "base_model.model."
    renamed = {
        "prefix missing": lambda key: key.removeprefix(prefix),
        "prefix doubled": lambda key: prefix + key,
        "adapter name inside": lambda key: (
            f"{key}.default" if key.endswith("vector") else f"{key.removesuffix('.weight')}.default.weight"
        ),
    }[style]
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    save_file({renamed(key): tensor for key, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((Path(folder) / "adapter_config.json").read_text())
    first, second = (Adapter("x", "base", Peft.read(where).layers) for where in (folder, tmp_path))
    assert first.hash == second.hash


def test_where_the_ranks_differ_the_tensors_win_in_the_scale_too_and_a_warning_has_both(tmp_path):
    path = "base_model.model.model.layers.0.q_proj"
    held = {f"{path}.lora_A.weight": torch.ones(4, 5), f"{path}.lora_B.weight": torch.ones(3, 4)}
    save_file(held, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"1 of 1 layers.*with 4 and 2.*scale too, which is 1\.5"):
        adapter = Adapter.from_pretrained(tmp_path)
    assert adapter.rank == 4
    assert torch.equal(adapter.delta("model.layers.0.q_proj"), torch.full((3, 5), 4 * 6 / 4))
