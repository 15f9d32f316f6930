"""`loraweave export`: the folder, the report and the server's flags."""

import json
import shlex

import pytest
import torch
from typer.testing import CliRunner

import loraweave as lw
from loraweave.cli import app
from loraweave.types import Factors

LAYER = "model.layers.0.self_attn.q_proj"


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def stored(here):
    torch.manual_seed(0)
    layers = {LAYER: Factors(torch.randn(12, 16), torch.randn(16, 12))}
    lw.Adapter("mine", "org/base", layers).save_pretrained(here / "mine")
    return here


def test_an_adapter_is_exported_without_a_model(stored):
    done = call("export", "mine", "--out", "p")
    assert done.exit_code == 0, done.stderr
    assert "wrote 1 layers of rank up to 12 for peft to p" in done.stdout
    assert lw.Adapter.from_pretrained("p").hash == lw.Adapter.from_pretrained("mine").hash


def test_vllm_gets_its_flags_and_the_error_of_the_cut(stored):
    done = call("export", "mine", "--target", "vllm", "--max-rank", "8", "--out", "p")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("rank cut in 1 layers: relative error 0.") for line in lines)
    command = shlex.split(next(line for line in lines if line.startswith("serve it: ")).removeprefix("serve it: "))
    assert command[:8] == ["vllm", "serve", "org/base", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
    assert command[8:] == ["--lora-modules", f"mine={stored / 'p'}"]
    assert lw.Adapter.from_pretrained("p").rank == 8


def test_json_has_the_errors_by_layer_and_the_flags(stored):
    done = call("export", "mine", "--target", "vllm", "--out", "p", "--json")
    told = json.loads(done.stdout)
    assert told["errors"] == {LAYER: 0.0}
    assert (told["rank"], told["flags"][:3]) == (12, ["--enable-lora", "--max-lora-rank", "16"])


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--target", "vlm"), 1, "did you mean 'vllm'"),
        (("--max-rank", "0"), 2, "--max-rank"),
        (("--base",), 2, "--base"),
    ],
)
def test_wrong_use_is_named_and_writes_nothing(stored, words, status, said):
    done = call("export", "mine", "--out", "p", *words)
    assert done.exit_code == status
    assert said in " ".join(done.stderr.split())
    assert not (stored / "p").exists()


def test_a_head_that_vllm_cannot_load_is_one_line_of_stderr(stored):
    head = {"lm_head.weight": torch.ones(4, 16)}
    layers = lw.Adapter.from_pretrained("mine").layers
    lw.Adapter("headed", "org/base", layers, heads=head).save_pretrained("headed")
    done = call("export", "headed", "--target", "vllm", "--out", "p")
    assert done.exit_code == 1
    assert "lm_head.weight" in done.stderr
    assert call("export", "headed", "--out", "p").exit_code == 0
