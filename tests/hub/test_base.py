"""Base models from folders, and the embedded default with a stand-in for the package that ships it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tiny_models import write_tiny_base as write_tiny_model

from loraweave.common.files import cache_folder
from loraweave.composer.composer import Composer
from loraweave.errors import BaseModelMismatch, PackageMissing, WeightingError
from loraweave.hub import base
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import EMBEDDED, base_key, fingerprint, load_base
from loraweave.types import Factors, Fingerprint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAWEAVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_local_folder_gives_model_and_tokenizer(tmp_path):
    written = write_tiny_model(tmp_path / "base")
    for name in (tmp_path / "base", str(tmp_path / "base")):
        model, tokenizer = load_base(name)
        assert fingerprint(model) == fingerprint(written)
        assert tokenizer("a")["input_ids"] == [3]


def test_a_loaded_model_is_in_evaluation_mode(tmp_path):
    write_tiny_model(tmp_path)
    assert not load_base(tmp_path)[0].training


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (None, torch.bfloat16),
        (torch.float32, torch.float32),
        ("float32", torch.float32),
        ("torch.float16", torch.float16),
        ("float64", torch.float64),
    ],
)
def test_a_folder_keeps_the_checkpoints_dtype_unless_asked(tmp_path, asked, found):
    write_tiny_model(tmp_path, dtype=torch.bfloat16)
    assert load_base(tmp_path, dtype=asked)[0].dtype == found


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"dtype": "bf16"},
            r"dtype='bf16' .* did you mean 'bfloat16'\?: give float32, bfloat16, float16, float64, as a text",
        ),
        ({"dtype": "int8"}, "dtype='int8' is not a dtype of weights"),
        ({"dtype": 16}, "dtype=16 is not a dtype of weights"),
        ({"torch_dtype": "bfloat16"}, r"load_base\(\) has no argument 'torch_dtype', did you mean 'dtype'\?"),
    ],
)
def test_a_wrong_dtype_is_answered_with_the_right_names(tmp_path, asked, said):
    write_tiny_model(tmp_path)
    with pytest.raises(WeightingError, match=said):
        load_base(tmp_path, **asked)


@pytest.mark.parametrize(("pad", "token"), [(False, "</s>"), (True, "<pad>")])
def test_a_tokenizer_without_padding_pads_with_the_end_token(tmp_path, pad, token):
    write_tiny_model(tmp_path, pad=pad)
    assert load_base(tmp_path)[1].pad_token == token


def test_the_device_is_the_one_asked_for(tmp_path):
    write_tiny_model(tmp_path)
    assert load_base(tmp_path, device="cpu")[0].device.type == "cpu"


@pytest.mark.parametrize(
    "broken", ["nothing there", "empty folder", "no weights", "config is not JSON", "truncated weights"]
)
def test_a_folder_that_is_no_base_model_is_refused_on_one_line(tmp_path, broken):
    folder = tmp_path / "base"
    if broken == "empty folder":
        folder.mkdir()
    elif broken != "nothing there":
        write_tiny_model(folder)
    weights = folder / "model.safetensors"
    if broken == "no weights":
        weights.unlink()
    elif broken == "config is not JSON":
        (folder / "config.json").write_text("{")
    elif broken == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(BaseModelMismatch, match=f"cannot load a base model from .*{EMBEDDED}") as caught:
        load_base(folder)
    assert "\n" not in str(caught.value)


def test_the_code_of_a_checkpoint_is_never_run(tmp_path):
    write_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(BaseModelMismatch):
        load_base(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """The folder of a tiny llama whose config and class are Python files of the checkpoint."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "base"
    write_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder


def test_the_code_of_a_checkpoint_runs_with_consent_alone(with_code):
    with pytest.raises(BaseModelMismatch, match=r"Python files .* read them, and pass trust_remote_code=True"):
        load_base(with_code)
    model, _ = load_base(with_code, trust_remote_code=True)
    assert type(model).__name__ == "Own"
    assert fingerprint(model).samples == fingerprint(load_base_of_class(with_code)).samples


def load_base_of_class(folder):
    from transformers import LlamaForCausalLM

    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "cpu", "device_map": "auto"}, "device='cpu' and device_map='auto'"),
        ({"trust_remote_code": "yes"}, "trust_remote_code='yes' is not True"),
        ({"revision": "main"}, "is a local folder: give the id of one"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused_before_anything_is_read(tmp_path, arguments, words):
    with pytest.raises(WeightingError, match=words):
        load_base(tmp_path, **arguments)


def test_the_embedded_default_has_no_revision():
    with pytest.raises(WeightingError, match="the embedded default comes from a package"):
        load_base(revision="main")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_is_the_one_asked_for_and_the_base_the_same(tmp_path, attention):
    written = write_tiny_model(tmp_path)
    model, _ = load_base(tmp_path, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert fingerprint(model) == fingerprint(written)


def test_a_quantisation_whose_package_is_missing_is_named(tmp_path):
    from transformers import QuantoConfig

    write_tiny_model(tmp_path)
    with pytest.raises(PackageMissing, match="quanto"):
        load_base(tmp_path, quantization_config=QuantoConfig(weights="int8"))


def test_a_model_spread_by_a_device_map_is_the_same_base_and_answers_the_same(tmp_path):
    written = write_tiny_model(tmp_path / "base").eval()
    ids = torch.tensor([[3, 1]])
    spread, _ = load_base(tmp_path / "base", device_map="auto")
    assert fingerprint(spread) == fingerprint(written)
    assert torch.equal(spread(ids).logits, written(ids).logits)
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    offloaded, _ = load_base(tmp_path / "base", device_map=places)
    # weights that are in a file until they are needed give no samples
    assert fingerprint(offloaded) == Fingerprint(fingerprint(written).shapes)
    assert torch.equal(offloaded(ids).logits, written(ids).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao"])
def test_a_quantised_base_is_held_for_the_one_that_its_adapters_were_made_for(tmp_path, kind):
    package = "torchao.quantization" if kind == "torchao" else "bitsandbytes"
    quantization = pytest.importorskip(package, exc_type=ImportError)
    from transformers import BitsAndBytesConfig, TorchAoConfig

    written = write_tiny_model(tmp_path).eval()
    configs = {
        "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True),
        "torchao": lambda: TorchAoConfig(quantization.Int8WeightOnlyConfig()),
    }
    model, _ = load_base(tmp_path, quantization_config=configs[kind](), device="cpu")
    assert fingerprint(model) == Fingerprint(fingerprint(written).shapes)
    assert base_key(written).contradicts(base_key(model)) == ""
    other = write_tiny_model(tmp_path / "other")
    other.lm_head = torch.nn.Linear(16, 7)
    assert "names and shapes" in base_key(other).contradicts(base_key(model))
    layer = "model.layers.0.self_attn.q_proj"
    expert = Adapter("a", str(tmp_path), {layer: Factors(torch.ones(2, 16), torch.ones(16, 2))}, fingerprint(written))
    assert list(Composer(model, [expert]).target_layers) == [layer]


def test_the_cache_is_one_folder_that_a_variable_moves(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAWEAVE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LORAWEAVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "loraweave"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "loraweave"


def test_the_fast_dtype_is_one_that_the_base_model_can_be_loaded_in():
    assert base.fast_dtype() in (torch.float32, torch.bfloat16)
