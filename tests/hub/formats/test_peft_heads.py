"""Heads against the installed peft: modules saved whole are read as it means them, and written so that it loads them."""

import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._contents import Contents
from loraweave.hub.formats.peft import Peft
from loraweave.types import Factors

# peft 0.21 asks transformers for an attribute that has been renamed there
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
LLAMA = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "pad_token_id": 0,
}
BERT = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
DISTIL = {"vocab_size": 29, "dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 3, "max_position_embeddings": 16}

BASES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "tied llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama classifier": lambda: transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**LLAMA, num_labels=3)),
    "bert classifier": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)),
    "bert tagger": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**BERT)),
    "bert reader": lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**BERT | {"num_labels": 2})),
    "roberta classifier": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**BERT)),
    "distilbert classifier": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(**DISTIL)
    ),
}

# base, settings of peft, and the heads that are trained
CASES = {
    "task adds the head": ("llama classifier", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}, ["score.weight"]),
    "head without a task": (
        "llama classifier",
        {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
        ["score.weight"],
    ),
    "head with a bias": (
        "bert classifier",
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        ["classifier.bias", "classifier.weight"],
    ),
    "trained biases next to a head": (
        "bert classifier",
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "lora_only"},
        ["classifier.bias", "classifier.weight"],
    ),
    "every bias next to a head": (
        "bert classifier",
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"},
        ["classifier.bias", "classifier.weight"],
    ),
    "tags": (
        "bert tagger",
        {"target_modules": ["value"], "task_type": "TOKEN_CLS"},
        ["classifier.bias", "classifier.weight"],
    ),
    "spans": (
        "bert reader",
        {"target_modules": ["value"], "task_type": "QUESTION_ANS"},
        ["qa_outputs.bias", "qa_outputs.weight"],
    ),
    "head of several layers": (
        "roberta classifier",
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        ["classifier.dense.bias", "classifier.dense.weight", "classifier.out_proj.bias", "classifier.out_proj.weight"],
    ),
    "name that ends another one": (
        "distilbert classifier",
        {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"},
        ["classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight"],
    ),
    "embedding and output": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"},
        ["lm_head.weight", "model.embed_tokens.weight"],
    ),
    "embedding of a tied base": (
        "tied llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"},
        ["model.embed_tokens.weight"],
    ),
    "output of a tied base": (
        "tied llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        ["lm_head.weight"],
    ),
    "norms, DoRA and rank-stabilised": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"], "use_dora": True, "use_rslora": True},
        [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)],
    ),
}


def base(name):
    torch.manual_seed(0)
    return BASES[name]().eval()


def output(model):
    with torch.no_grad():
        result = model(input_ids=TOKENS)
    return torch.cat([result[key].flatten() for key in ("logits", "start_logits", "end_logits") if key in result])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (folder that peft wrote, the logits of what it makes of it), made on first use."""
    made = {}

    def make(name):
        if name not in made:
            model_name, options, _ = CASES[name]
            folder = tmp_path_factory.mktemp("adapter")
            with warnings.catch_warnings():
                # about tied weights and about tiny models that no model hub has
                warnings.simplefilter("ignore")
                model = peft.get_peft_model(base(model_name), peft.LoraConfig(r=2, lora_alpha=5, **options))
                torch.manual_seed(1)
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data += 0.1 * torch.randn_like(parameter)
                model.save_pretrained(folder, save_embedding_layers=False)
                again = peft.PeftModel.from_pretrained(base(model_name), folder).eval()
            assert not torch.allclose(output(again), output(base(model_name)), atol=1e-3)
            made[name] = folder, again
        return made[name]

    return make


def reloaded(folder, name):
    with warnings.catch_warnings():
        # what peft warns of by design: heads of a base whose embeddings are tied
        warnings.filterwarnings("ignore", "Model .*tie_word_embeddings|.*tied", UserWarning)
        return peft.PeftModel.from_pretrained(base(CASES[name][0]), folder).eval()


@pytest.mark.parametrize("name", CASES)
def test_saved_modules_are_heads_by_the_parameters_that_they_replace(saved, name):
    folder, model = saved(name)
    contents = Peft.read(folder)
    assert sorted(contents.heads) == CASES[name][2]
    stored = load_file(folder / "adapter_model.safetensors")
    for parameter, tensor in contents.heads.items():
        assert torch.equal(tensor, stored[f"base_model.model.{parameter}"])
        module, _, last = parameter.rpartition(".")
        wrapped = dict(model.base_model.model.named_modules())
        outer = next(
            path
            for path in wrapped
            if isinstance(wrapped[path], peft.utils.ModulesToSaveWrapper) and f"{module}.".startswith(f"{path}.")
        )
        inside = f"{module}.{last}".removeprefix(f"{outer}.")
        assert torch.equal(tensor, wrapped[outer].modules_to_save["default"].get_parameter(inside))


@pytest.mark.parametrize("name", CASES)
def test_written_folder_gives_pefts_logits_again(saved, name, tmp_path):
    folder, model = saved(name)
    Peft.write(Peft.read(folder), tmp_path / "out")
    torch.testing.assert_close(output(reloaded(tmp_path / "out", name)), output(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_peft_finds_no_missing_and_no_unexpected_key_in_a_written_folder(saved, name, tmp_path):
    folder, _ = saved(name)
    Peft.write(Peft.read(folder), tmp_path / "out")
    fresh = reloaded(tmp_path / "out", name)
    result = peft.set_peft_model_state_dict(fresh, peft.utils.load_peft_weights(str(tmp_path / "out"), device="cpu"))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]


@pytest.mark.parametrize("name", CASES)
def test_reading_a_written_folder_gives_the_same_hash(saved, name, tmp_path):
    adapter = Adapter.from_pretrained(saved(name)[0], name="x")
    assert Adapter.from_pretrained(adapter.save_pretrained(tmp_path / "out")).hash == adapter.hash


@pytest.mark.parametrize("name", CASES)
def test_heads_without_a_record_of_their_config_load_too(saved, name, tmp_path):
    folder, model = saved(name)
    bare = replace(Peft.read(folder), card={})
    Peft.write(bare, tmp_path / "out")
    torch.testing.assert_close(output(reloaded(tmp_path / "out", name)), output(model), rtol=1e-6, atol=1e-6)


def test_task_that_needs_a_head_is_left_out_with_the_head(saved, tmp_path):
    contents = replace(Peft.read(saved("task adds the head")[0]), heads={})
    Peft.write(contents, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == (None, None)
    # peft would look for a head that is not there
    assert peft.PeftModel.from_pretrained(base("llama classifier"), tmp_path / "out").peft_config["default"].r == 2


def test_task_is_kept_with_the_head(saved, tmp_path):
    Peft.write(Peft.read(saved("task adds the head")[0]), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])


LAYER = "model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "a/base", "target_modules": ["q_proj"]}
HEAD = torch.arange(6.0).reshape(2, 3)


def folder_of(path, config=None, **extra):
    path.mkdir(exist_ok=True)
    held = {f"base_model.model.{LAYER}.lora_A.weight": torch.ones(2, 5)}
    held[f"base_model.model.{LAYER}.lora_B.weight"] = torch.ones(3, 2)
    tensors = {key: tensor for key, tensor in {**held, **extra}.items() if tensor is not None}
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, "modules_to_save": ["score"], **(config or {})}))
    return path


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.score.weight",
        "score.weight",
        "base_model.model.base_model.model.score.weight",
        "base_model.model.score.modules_to_save.default.weight",
        "base_model.model.score.modules_to_save.weight",
    ],
)
def test_names_of_every_age_mean_the_same_head(tmp_path, key):
    heads = Peft.read(folder_of(tmp_path / "a", **{key: HEAD})).heads
    assert list(heads) == ["score.weight"]
    assert torch.equal(heads["score.weight"], HEAD)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_only_one_of_the_names_that_a_task_adds_need_be_there(tmp_path, task):
    config = {"task_type": task, "modules_to_save": ["classifier", "score"]}
    assert list(Peft.read(folder_of(tmp_path / "a", config, **{"score.weight": HEAD})).heads) == ["score.weight"]


def test_head_next_to_updates_of_zero_is_an_effect(tmp_path):
    zero = {f"base_model.model.{LAYER}.lora_B.weight": torch.zeros(3, 2), "score.weight": HEAD}
    contents = Peft.read(folder_of(tmp_path / "a", **zero))
    assert list(Peft.read(Peft.write(contents, tmp_path / "b")).heads) == ["score.weight"]


def test_heads_change_the_hash(tmp_path):
    adapter = Adapter.from_pretrained(folder_of(tmp_path / "a", **{"score.weight": HEAD}))
    other = Adapter.from_pretrained(folder_of(tmp_path / "b", **{"score.weight": HEAD + 1}))
    assert len({adapter.hash, other.hash, replace(adapter, heads={}).hash}) == 3


def test_card_names_the_heads(tmp_path):
    Peft.write(Peft.read(folder_of(tmp_path / "a", **{"score.weight": HEAD})), tmp_path / "b")
    assert "- Trained heads: score.weight" in (tmp_path / "b" / "README.md").read_text()


LORA = {f"base_model.model.{LAYER}.lora_{letter}.weight": None for letter in "AB"}
REFUSED_FOLDERS = {
    "listed head is missing": ({}, {}, AdapterCorrupt, "modules_to_save lists 'score'"),
    "one of two listed heads is missing": (
        {"modules_to_save": ["score", "lm_head"]},
        {"score.weight": HEAD},
        AdapterCorrupt,
        "'lm_head'",
    ),
    "every head of a task is missing": (
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
        {},
        AdapterCorrupt,
        "'classifier'",
    ),
    "head that is not listed": ({"modules_to_save": None}, {"score.weight": HEAD}, AdapterUnsupported, "does not list it"),
    "inner name that is not listed": (
        {"modules_to_save": None},
        {"x.modules_to_save.default.weight": HEAD},
        AdapterUnsupported,
        "does not list",
    ),
    "another adapter's copy": (
        {},
        {"score.modules_to_save.other.weight": HEAD},
        AdapterUnsupported,
        "score.modules_to_save.other.weight",
    ),
    "copy of the base's": (
        {},
        {"score.weight": HEAD, "score.original_module.weight": HEAD + 1},
        AdapterUnsupported,
        "original_module",
    ),
    "update within a head": (
        {},
        {"score.lora_A.weight": HEAD, "score.lora_B.weight": HEAD + 1, "score.weight": HEAD + 2},
        AdapterUnsupported,
        r"score\.lora_",
    ),
    "name that ends a factor's": ({"modules_to_save": ["A"]}, {}, AdapterUnsupported, r"q_proj\.lora_A"),
    "one head twice": (
        {},
        {"score.weight": HEAD, "score.modules_to_save.weight": HEAD + 1},
        AdapterCorrupt,
        "several tensors are the head",
    ),
    "the base's weight next to every bias": (
        {"bias": "all"},
        {"score.weight": HEAD, "score.original_module.weight": HEAD + 1},
        AdapterUnsupported,
        "original_module",
    ),
    "head of nothing": ({}, {"score.weight": torch.zeros(0, 3)}, AdapterCorrupt, "holds nothing"),
    "NaN": ({}, {"score.weight": torch.full((2, 3), float("nan"))}, AdapterCorrupt, "6 of 6 .*'score.weight'"),
    "whole numbers": ({}, {"score.num_batches": torch.ones(2, dtype=torch.int64)}, AdapterUnsupported, "I64"),
    "heads alone": ({}, {**LORA, "score.weight": HEAD}, AdapterUnsupported, "no low-rank update"),
    "names of a wrong type": (
        {"modules_to_save": "score"},
        {"score.weight": HEAD},
        AdapterCorrupt,
        "modules_to_save is 'score'",
    ),
    "empty name": ({"modules_to_save": [""]}, {"score.weight": HEAD}, AdapterCorrupt, "modules_to_save"),
}


@pytest.mark.parametrize("case", REFUSED_FOLDERS)
def test_head_that_is_not_exactly_understood_is_refused(tmp_path, case):
    config, extra, error, message = REFUSED_FOLDERS[case]
    with pytest.raises(error, match=message):
        Peft.read(folder_of(tmp_path / "some-adapter", config, **extra))


def contents(heads, layer=LAYER, peft_card=None):
    factors = Factors(torch.ones(2, 5), torch.ones(3, 2))
    return Contents("a/base", {layer: factors}, None, {"peft": peft_card or {}}, heads)


REFUSED_HEADS = {
    "bare parameter": (contents({"weight": HEAD}), "not a parameter of a module"),
    "words of adapters": (contents({"score.lora_A.weight": HEAD}), "not a parameter of a module"),
    "empty step": (contents({"score..weight": HEAD}), "not a parameter of a module"),
    "long name": (contents({f"{'x' * 600}.weight": HEAD}), "cannot hold"),
    "update within the head": (contents({"proj.weight": HEAD}, layer="model.q_proj"), "'model.q_proj' has an update"),
    "not finite": (contents({"score.weight": HEAD / 0}), "infinite"),
    "whole numbers": (contents({"score.weight": HEAD.long()}), "int64"),
    "nothing": (contents({"score.weight": torch.zeros(0)}), "hold something"),
}


@pytest.mark.parametrize("case", REFUSED_HEADS)
def test_head_without_a_form_in_peft_is_refused_and_nothing_appears(case, tmp_path):
    held, message = REFUSED_HEADS[case]
    with pytest.raises(AdapterUnsupported, match=message):
        Peft.write(held, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_head_beyond_half_precision_is_refused_when_that_is_asked_for(tmp_path):
    with pytest.raises(AdapterUnsupported, match=r"score.weight.*float16"):
        Peft.write(contents({"score.weight": HEAD * 1e6}), tmp_path / "out", dtype=torch.float16)


def test_head_that_shares_memory_with_another_is_written(tmp_path):
    shared = contents({"lm_head.weight": HEAD, "model.embed_tokens.weight": HEAD})
    again = Peft.read(Peft.write(shared, tmp_path / "out")).heads
    assert torch.equal(again["lm_head.weight"], HEAD)
    assert torch.equal(again["model.embed_tokens.weight"], HEAD)


class Scored(nn.Module):
    """A head deep inside, whose name is also the beginning of a regular expression's trouble."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"a.b".replace(".", "_"): nn.Linear(4, 2)})

    def forward(self, x):
        return self.inner["a_b"](self.q(x))


def test_head_of_any_module_loads_by_its_path(tmp_path):
    torch.manual_seed(0)
    model, x = Scored(), torch.randn(3, 4)
    heads = {"inner.a_b.weight": torch.randn(2, 4), "inner.a_b.bias": torch.randn(2)}
    given = Contents("", {"q": Factors(torch.randn(1, 4), torch.randn(4, 1))}, None, {}, heads)
    loaded = peft.PeftModel.from_pretrained(model, Peft.write(given, tmp_path / "out"))
    with torch.no_grad():
        hidden = x @ model.q.base_layer.weight.T + model.q.base_layer.bias
        hidden = hidden + x @ (given.layers["q"].b_OR @ given.layers["q"].a_RI).T
        want = hidden @ heads["inner.a_b.weight"].T + heads["inner.a_b.bias"]
        torch.testing.assert_close(loaded(x), want)
