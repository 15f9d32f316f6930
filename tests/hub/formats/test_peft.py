"""PEFT folders against the installed peft: what it computes must be what the factors say, and what we write it must load."""

import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from peft_models import TARGETS, lora, put, save
from properties import Properties
from safetensors.torch import load_file, save_file
from torch import nn

from loraweave.hub.adapter import Adapter
from loraweave.hub.formats.peft import Peft
from loraweave.lowrank import algebra

# peft 0.21 asks transformers for an attribute that has been renamed there
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
PREFIX = "base_model.model."


class Mixed(nn.Module):
    """An embedding, two convolutions and a linear layer in a row."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(17, 6)
        self.conv1 = nn.Conv1d(6, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 3, (3, 2), padding=1, bias=False)
        self.head = nn.Linear(5, 4)

    def forward(self, input_ids):
        y_BDT = self.conv1(self.emb(input_ids).transpose(1, 2))
        z = self.conv2(y_BDT[:, None])
        return {"logits": self.head(y_BDT.transpose(1, 2)) + z.mean()}


SIZES = {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
LLAMA = {**SIZES, "num_key_value_heads": 3, "attention_bias": True, "pad_token_id": 0}
BERT = {**SIZES, "max_position_embeddings": 16, "num_labels": 3}
DISTIL = {"vocab_size": 29, "dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 3, "max_position_embeddings": 16}
GPT2 = {"vocab_size": 29, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 16}
BASES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "tied llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
    "llama classifier": ("LlamaForSequenceClassification", "LlamaConfig", LLAMA | {"num_labels": 3}),
    "bert classifier": ("BertForSequenceClassification", "BertConfig", BERT),
    "bert tagger": ("BertForTokenClassification", "BertConfig", BERT),
    "bert reader": ("BertForQuestionAnswering", "BertConfig", BERT | {"num_labels": 2}),
    "roberta classifier": ("RobertaForSequenceClassification", "RobertaConfig", BERT),
    "distilbert classifier": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
}


def case(base, targets, heads="", **options):
    """(base, settings of peft, the heads that are trained); targets in one text are an expression."""
    return base, {"r": 2, "target_modules": targets, **options}, heads.split()


Q, QV, CLASSIFIER = ["q_proj"], ["q_proj", "v_proj"], "classifier.bias classifier.weight"
CASES = {
    "plain": case("llama", QV, r=4, lora_alpha=8),
    "odd alpha": case("llama", ["q_proj", "down_proj"], r=3, lora_alpha=7),
    "rslora": case("llama", Q, r=3, lora_alpha=5, use_rslora=True),
    "patterns": case(
        "llama",
        [*QV, "down_proj"],
        r=4,
        lora_alpha=6,
        rank_pattern={"v_proj": 2, r"layers\.1\..*(q|k)_proj": 5},
        alpha_pattern={r"^model.layers.0.self_attn.q_proj": 3, "mlp.down_proj": 16},
    ),
    "rslora with patterns": case(
        "llama", "all-linear", r=4, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}
    ),
    "dora": case("llama", ["q_proj", "up_proj"], r=4, lora_alpha=8, use_dora=True),
    "lora_bias": case("llama", ["q_proj", "o_proj"], lora_alpha=6, lora_bias=True),
    "bias all": case("llama", Q, bias="all"),
    "bias lora_only": case("llama", ["q_proj", "k_proj"], bias="lora_only"),
    "layers_to_transform": case("llama", Q, layers_to_transform=[1], layers_pattern="layers"),
    "excluded": case("llama", QV, exclude_modules=["layers.0.self_attn.q_proj"]),
    "regular expression": case("llama", r".*layers\.[01]\.self_attn\.(q|o)_proj"),
    "all-linear": case("llama", "all-linear"),
    "head by its short name": case("llama", ["lm_head", "q_proj"]),
    "gaussian": case("llama", Q, init_lora_weights="gaussian"),
    "conv1d of gpt2": case("gpt2", ["c_attn", "c_proj"], r=4, fan_in_fan_out=True),
    "dora on conv1d of gpt2": case("gpt2", ["c_attn"], r=4, fan_in_fan_out=True, use_dora=True),
    "embedding": case("mixed", ["emb", "head"], r=3, lora_alpha=5),
    "convolutions": case("mixed", ["conv1", "conv2", "head"], lora_alpha=5),
    "dora on an embedding": case("mixed", ["emb", "head"], r=3, lora_alpha=5, use_dora=True),
    "dora on convolutions": case("mixed", ["conv1", "conv2"], lora_alpha=5, use_dora=True),
    "lora_bias on a convolution": case("mixed", ["conv1", "head"], lora_bias=True),
}
UPDATES = list(CASES)
CASES |= {
    "task adds the head": case("llama classifier", Q, "score.weight", task_type="SEQ_CLS"),
    "head without a task": case("llama classifier", Q, "score.weight", modules_to_save=["score"]),
    "head with a bias": case("bert classifier", ["query"], CLASSIFIER, task_type="SEQ_CLS"),
    "trained biases next to a head": case("bert classifier", ["query"], CLASSIFIER, task_type="SEQ_CLS", bias="lora_only"),
    "every bias next to a head": case("bert classifier", ["query"], CLASSIFIER, task_type="SEQ_CLS", bias="all"),
    "tags": case("bert tagger", ["value"], CLASSIFIER, task_type="TOKEN_CLS"),
    "spans": case("bert reader", ["value"], "qa_outputs.bias qa_outputs.weight", task_type="QUESTION_ANS"),
    "head of several layers": case(
        "roberta classifier",
        ["query"],
        "classifier.dense.bias classifier.dense.weight classifier.out_proj.bias classifier.out_proj.weight",
        task_type="SEQ_CLS",
    ),
    "name that ends another one": case(
        "distilbert classifier",
        ["q_lin"],
        f"{CLASSIFIER} pre_classifier.bias pre_classifier.weight",
        task_type="SEQ_CLS",
    ),
    "embedding and output": case(
        "llama",
        Q,
        "lm_head.weight model.embed_tokens.weight",
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    ),
    "embedding of a tied base": case(
        "tied llama", Q, "model.embed_tokens.weight", modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    ),
    "output of a tied base": case("tied llama", Q, "lm_head.weight", modules_to_save=["lm_head"]),
    "norms, DoRA and rank-stabilised": case(
        "llama",
        Q,
        "model.layers.0.input_layernorm.weight model.layers.1.input_layernorm.weight",
        modules_to_save=["input_layernorm"],
        use_dora=True,
        use_rslora=True,
    ),
}
HEADS = [name for name in CASES if name not in UPDATES]


def base_of(name):
    torch.manual_seed(0)
    if name == "mixed":
        return Mixed().eval()
    model, config, sizes = BASES[name]
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()


def output(model):
    with torch.no_grad():
        result = model(input_ids=TOKENS)
    return torch.cat([result[key].flatten() for key in ("logits", "start_logits", "end_logits") if key in result])


def loaded(folder, name):
    """What peft makes of a folder; a missing key would be a warning, and warnings are errors."""
    with warnings.catch_warnings():
        # by design: heads of a base whose embeddings are tied
        warnings.filterwarnings("ignore", "Model .*tie_word_embeddings|.*tied", UserWarning)
        return peft.PeftModel.from_pretrained(base_of(CASES[name][0]), folder).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (folder, what peft makes of the folder), made on first use."""
    made = {}

    def make(name):
        if name not in made:
            base, options, heads = CASES[name]
            folder = tmp_path_factory.mktemp("adapter")
            save(peft.LoraConfig(**options), folder, base_of(base), scale=0.1, save_embedding_layers=False)
            made[name] = folder, loaded(folder, name)
            assert not heads or not torch.allclose(output(made[name][1]), output(base_of(base)), atol=1e-3)
        return made[name]

    return make


PROPERTIES = Properties(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_config_keeps_all_properties(name, request, saved):
    PROPERTIES.walk(request, name, saved=saved)


def tuned_layers(model):
    named = model.named_modules()
    return {name.removeprefix(PREFIX): module for name, module in named if isinstance(module, peft.tuners.lora.LoraLayer)}


@PROPERTIES.add(of=[name for name in UPDATES if "dora" not in name])
def delta_of_every_layer_is_pefts(saved, name):
    folder, model = saved(name)
    layers = Peft.read(folder).layers
    tuned = tuned_layers(model)
    assert {layer for layer, factors in layers.items() if factors.rank} == set(tuned)
    for layer, module in tuned.items():
        delta_OI = (layers[layer].b_OR @ layers[layer].a_RI).detach()
        theirs = module.get_delta_weight("default").detach()
        if CASES[name][0] == "gpt2" or layers[layer].kind == "embedding":
            theirs = theirs.T
        torch.testing.assert_close(delta_OI, theirs.reshape(delta_OI.shape), rtol=1e-5, atol=1e-6)


@PROPERTIES.add(of=["dora", "dora on conv1d of gpt2"])
def bound_dora_changes_a_layers_output_as_peft_does(saved, name):
    folder, model = saved(name)
    x_TI = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    for layer, module in tuned_layers(model).items():
        weight_OI = module.base_layer.weight if name == "dora" else module.base_layer.weight.T
        bias_O = module.base_layer.bias if module.base_layer.bias is not None else torch.zeros(weight_OI.shape[0])
        bound = algebra.bind(Peft.read(folder).layers[layer], weight_OI, bias_O)
        with torch.no_grad():
            y0_TO = x_TI @ weight_OI.T
            ours_TO = y0_TO + bias_O + (x_TI @ bound.a_RI.T) @ bound.b_OR.T + bound.gain_O * y0_TO
            torch.testing.assert_close(ours_TO, module(x_TI), rtol=1e-5, atol=1e-5)


@PROPERTIES.add(of=["lora_bias", "lora_bias on a convolution"])
def bias_of_lora_b_is_scaled_like_the_update(saved, name):
    folder, model = saved(name)
    for layer, module in tuned_layers(model).items():
        theirs_O = module.lora_B["default"].bias.detach() * module.scaling["default"]
        torch.testing.assert_close(Peft.read(folder).layers[layer].bias_O, theirs_O)


def test_trained_biases_of_every_layer_are_read_as_they_are_and_give_a_layer_without_an_update_rank_zero(saved):
    folder, model = saved("bias all")
    layers = Peft.read(folder).layers
    named = {name: p for name, p in model.get_base_model().named_parameters() if name.endswith(".bias")}
    assert len(named) == 8
    for name, parameter in named.items():
        layer = name.removesuffix(".bias").removesuffix(".base_layer")
        assert torch.equal(layers[layer].base_bias_O, parameter.detach())
    alone = layers["model.layers.0.self_attn.v_proj"]
    assert (alone.rank, alone.b_OR.shape) == (0, (24, 0))


@PROPERTIES.add(of=HEADS)
def saved_modules_are_heads_by_the_parameters_that_they_replace(saved, name):
    folder, model = saved(name)
    contents = Peft.read(folder)
    assert sorted(contents.heads) == CASES[name][2]
    stored = load_file(folder / "adapter_model.safetensors")
    wrapped = dict(model.base_model.model.named_modules())
    kept = [path for path in wrapped if isinstance(wrapped[path], peft.utils.ModulesToSaveWrapper)]
    for parameter, tensor in contents.heads.items():
        assert torch.equal(tensor, stored[f"{PREFIX}{parameter}"])
        outer = next(path for path in kept if parameter.startswith(f"{path}."))
        own = wrapped[outer].modules_to_save["default"].get_parameter(parameter.removeprefix(f"{outer}."))
        assert torch.equal(tensor, own)


@PROPERTIES.add()
def written_folder_gives_pefts_outputs_again_and_no_key_is_missing_or_unexpected(saved, name, tmp_path):
    folder, model = saved(name)
    Peft.write(Peft.read(folder), tmp_path / "out")
    again = loaded(tmp_path / "out", name)
    torch.testing.assert_close(output(again), output(model), rtol=1e-6, atol=1e-6)
    assert set(tuned_layers(again)) == set(tuned_layers(model))
    result = peft.set_peft_model_state_dict(again, peft.utils.load_peft_weights(str(tmp_path / "out"), device="cpu"))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]


@PROPERTIES.add()
def reading_a_written_folder_gives_the_same_hash(saved, name, tmp_path):
    adapter = Adapter.from_pretrained(saved(name)[0], name="x")
    assert Adapter.from_pretrained(adapter.save_pretrained(tmp_path / "out")).hash == adapter.hash


@PROPERTIES.add(of=HEADS)
def heads_without_a_record_of_their_config_load_too(saved, name, tmp_path):
    folder, model = saved(name)
    Peft.write(replace(Peft.read(folder), card={}), tmp_path / "out")
    torch.testing.assert_close(output(loaded(tmp_path / "out", name)), output(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("heads", "written"), [({}, (None, None)), (None, ("SEQ_CLS", ["score"]))])
def test_task_that_needs_a_head_is_kept_with_the_head_alone(saved, tmp_path, heads, written):
    contents = Peft.read(saved("task adds the head")[0])
    Peft.write(contents if heads is None else replace(contents, heads=heads), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == written
    # with the task peft would look for a head
    assert loaded(tmp_path / "out", "task adds the head").peft_config["default"].r == 2


def test_first_of_several_matching_alpha_patterns_decides_and_a_warning_tells(tmp_path):
    alphas = {"down_proj": 1, "mlp.down_proj": 16}
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["down_proj"], alpha_pattern=alphas)
    save(config, tmp_path, base_of("llama"), save_embedding_layers=False)
    with pytest.warns(UserWarning, match="PEFT sorts the entries"):
        layers = Peft.read(tmp_path).layers
    model = peft.PeftModel.from_pretrained(base_of("llama"), tmp_path)
    for layer, module in tuned_layers(model).items():
        torch.testing.assert_close(algebra.delta(layers[layer]), module.get_delta_weight("default").detach())


def test_scale_that_is_a_power_of_two_is_exact(saved):
    folder, model = saved("plain")
    for layer, module in tuned_layers(model).items():
        assert torch.equal(Peft.read(folder).layers[layer].b_OR, module.lora_B["default"].weight.detach() * 2)


def test_embedding_and_convolution_keep_kind_and_kernel(saved):
    layers = Peft.read(saved("embedding")[0]).layers | Peft.read(saved("convolutions")[0]).layers
    found = {name: (layers[name].kind, layers[name].kernel, tuple(layers[name].a_RI.shape)) for name in layers}
    assert found["emb"] == ("embedding", (), (3, 17))
    assert (found["conv1"], found["conv2"]) == (("conv", (3,), (2, 18)), ("conv", (3, 2), (2, 6)))


def test_fan_in_fan_out_is_recorded_and_put_back(saved, tmp_path):
    contents = Peft.read(saved("conv1d of gpt2")[0])
    assert contents.card["peft"]["fan_in_fan_out"] is True
    config = json.loads((Peft.write(contents, tmp_path / "out") / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True


def test_half_precision_option_rounds_and_is_read_back_in_fp32(saved, tmp_path):
    contents = Peft.read(saved("plain")[0])
    again = Peft.read(Peft.write(contents, tmp_path / "out", dtype=torch.float16))
    assert again.card["stored_dtype"] == "float16"
    for layer, factors in contents.layers.items():
        assert torch.equal(again.layers[layer].b_OR, factors.b_OR.half().float())


def test_saved_embedding_next_to_its_update_is_refused_with_the_way_out(tmp_path):
    save(peft.LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path, base_of("llama"))
    with pytest.raises(ValueError, match="save_embedding_layers=False"):
        Peft.read(tmp_path)


RENAMED = {
    "prefix missing": lambda key: key.removeprefix(PREFIX),
    "prefix doubled": lambda key: PREFIX + key,
    "adapter name inside": lambda key: (
        f"{key}.default" if key.endswith("vector") else f"{key.removesuffix('.weight')}.default.weight"
    ),
}


@pytest.mark.parametrize("style", RENAMED)
def test_keys_of_every_age_mean_the_same_layers(saved, style, tmp_path):
    folder, _ = saved("dora")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({RENAMED[style](key): tensor for key, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    assert Adapter.from_pretrained(tmp_path).hash == Adapter.from_pretrained(folder).hash


def test_where_the_ranks_differ_the_tensors_win_in_the_scale_too_and_a_warning_has_both(tmp_path):
    put(tmp_path, lora("q_proj", a=torch.ones(4, 5), b=torch.ones(3, 4)), lora_alpha=6)
    with pytest.warns(UserWarning, match=r"1 of 1 layers.*with 4 and 2.*scale too, which is 1\.5"):
        adapter = Adapter.from_pretrained(tmp_path)
    assert adapter.rank == 4
    assert torch.equal(adapter.delta("q_proj"), torch.full((3, 5), 4 * 6 / 4))


def test_a_plain_lora_is_cut_where_a_rank_asks_for_it(tmp_path):
    save(peft.LoraConfig(r=4, target_modules=TARGETS), tmp_path)
    assert Adapter.from_pretrained(tmp_path, rank=4).card.get("conversion") is None
    cut = Adapter.from_pretrained(tmp_path, rank=2, max_error=0.9)
    assert {note["rank"] for note in cut.card["conversion"].values()} == {2}
