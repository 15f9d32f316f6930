"""`loraweave load`: the folder that a formula becomes, and `export` for engines; with the refusals before and after."""

import json
import shlex

import pytest
import torch
from command_line import LAYERS, adapter, call

import loraweave as lw


@pytest.fixture
def hub(here):
    with lw.Hub("adapters") as opened:
        for seed, name in enumerate(("left", "right")):
            opened.add(adapter(name, seed))
        yield opened


def test_a_formula_is_written_before_a_server_is_asked(hub, here):
    done = call("load", "0.5*left + 0.5*right", "--into", "sglang", "--url", "http://127.0.0.1:1")
    assert done.exit_code == 1
    assert "nothing answers at http://127.0.0.1:1/load_lora_adapter" in done.stderr
    [folder] = [path for path in (here / "served").iterdir() if path.is_dir()]
    assert lw.Adapter.from_pretrained(folder).rank == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["left + rigth", "--into", "lorax"], "did you mean 'right'"),
        (["left", "--into", "vllm"], "vLLM asks loraweave by itself"),
        (["left + right", "--into", "lorax", "--max-rank", "1"], "above the limit of 0.001"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(hub, words, said):
    done = call("load", *words, "--url", "http://127.0.0.1:1")
    assert done.exit_code == 1
    assert said in done.stderr


@pytest.fixture
def stored(here):
    adapter("mine", rank=12, layers=LAYERS[:1], base_model="org/base").save_pretrained(here / "mine")
    return here


def test_vllm_gets_its_flags_and_the_error_of_the_cut(stored):
    done = call("export", "mine", "--target", "vllm", "--max-rank", "8", "--out", "p")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("rank cut in 1 layers: relative error 0.") for line in lines)
    command = shlex.split(next(line for line in lines if line.startswith("serve it: ")).removeprefix("serve it: "))
    assert command[:8] == ["vllm", "serve", "org/base", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
    assert command[8:] == ["--lora-modules", f"mine={stored / 'p'}"]
    assert lw.Adapter.from_pretrained("p").rank == 8


def test_llama_cpp_gets_a_file_for_the_architecture_of_the_base_which_an_empty_folder_or_an_earlier_file_gives_way_to(
    stored, base
):
    (stored / "p").mkdir()
    for _ in range(2):
        done = call("export", "mine", "--target", "gguf", "--base", base, "--out", "p")
        assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in (stored / "p").iterdir()) == ["Modelfile", "README.md", "adapter.gguf"]
    assert "note: llama-server -m BASE.gguf --lora p/adapter.gguf applies it" in done.stdout


def test_json_has_the_errors_by_layer_and_the_flags(stored):
    done = call("export", "mine", "--target", "vllm", "--out", "p", "--json")
    told = json.loads(done.stdout)
    assert told["errors"] == {LAYERS[0]: 0.0}
    assert (told["rank"], told["flags"][:3]) == (12, ["--enable-lora", "--max-lora-rank", "16"])


def test_a_head_that_vllm_cannot_load_is_one_line_of_stderr(stored):
    head = {"lm_head.weight": torch.ones(4, 16)}
    layers = lw.Adapter.from_pretrained("mine").layers
    lw.Adapter("headed", "org/base", layers, heads=head).save_pretrained("headed")
    done = call("export", "headed", "--target", "vllm", "--out", "p")
    assert done.exit_code == 1
    assert "lm_head.weight" in done.stderr
    assert call("export", "headed", "--out", "p").exit_code == 0
