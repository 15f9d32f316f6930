"""`loraweave explain`, on a tiny composition that was saved."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import loraweave as lw
from loraweave.cli import app
from loraweave.types import Factors

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
TASK = lw.Task([("ab", "c")], instruction="Go on.")


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    known = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyzGIO .\n:"]
    inner = Tokenizer(WordLevel({token: index for index, token in enumerate(known)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=4, **sizes)).save_pretrained(folder)
    return folder


def compose(base, folder, weights):
    model, tokenizer = lw.load_base(str(base))
    layers = {layer: Factors(torch.ones(2, 16), torch.ones(16, 2)) for layer in LAYERS}
    pool = lw.ExpertPool([lw.Adapter(name, str(base), layers) for name in ("[left]", "$right")])
    method = "manual" if weights else "base"
    composed = lw.compose(model, tokenizer, pool, TASK, method=method, weights=weights or None, progress=False)
    return composed.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    return compose(base, tmp_path_factory.mktemp("c") / "composed", {"[left]": 0.75, "$right": -0.25})


def test_the_table_has_the_adapters_by_their_share(saved, here):
    done = call("explain", saved, "ab")
    assert done.exit_code == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("│")[1:5]] for line in done.stdout.splitlines() if line.startswith("│")]
    assert rows == [["[left]", "75.0%", "100.0%", "0.75"], ["$right", "25.0%", "100.0%", "-0.25"]]


def test_json_has_tokens_layers_and_weights(saved, here):
    done = call("explain", saved, "ab", "--json")
    told = json.loads(done.stdout)
    assert "".join(told["tokens"]) == TASK.prompt("ab")
    assert (told["layers"], told["experts"], told["plot"]) == (list(LAYERS), ["[left]", "$right"], None)
    # the same for all tokens and layers
    assert told["weights"] == [[[0.75, -0.25]]]
    assert told["load"][LAYERS[0]]["share"] == [0.75, 0.25]


def test_tokens_of_the_answer_are_explained_when_asked_for(saved, here):
    tokens = json.loads(call("explain", saved, "ab", "--max-new-tokens", "4", "--json").stdout)["tokens"]
    assert len(TASK.prompt("ab")) < len(tokens) <= len(TASK.prompt("ab")) + 3


def test_the_plot_is_written_where_it_is_wanted(saved, here):
    done = call("explain", saved, "ab", "--plot", "weights.svg")
    assert (done.exit_code, done.stderr) == (0, "drew weights.svg\n")
    assert "<svg" in (here / "weights.svg").read_text()


def test_the_page_is_written_where_it_is_wanted(saved, here):
    done = call("explain", saved, "ab", "--page", "weights.html")
    assert (done.exit_code, done.stderr) == (0, "wrote weights.html\n")
    assert (here / "weights.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_base_model_has_a_table_and_no_picture(base, here):
    folder = compose(base, here / "c", {})
    assert "the base model itself" in call("explain", folder, "ab").stdout
    done = call("explain", folder, "ab", "--plot", "x.png")
    assert (done.exit_code, done.stderr.split(":")[0]) == (1, "CompositionError")
    assert not (here / "x.png").exists()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("nowhere", "ab"), 2, "'nowhere' does not exist"),
        (("empty", "ab"), 1, "AdapterNotFound: empty holds no composition.json"),
        (("composed",), 2, "Missing argument 'text'"),
        (("composed", "ab", "--plot", "x.bmp2"), 2, "ends in .png, .svg, .pdf, not 'x.bmp2'"),
        (("composed", "ab", "--page", "x.png"), 2, "ends in .html, not 'x.png'"),
        (("composed", "ab", "--max-new-tokens", "-1"), 2, "--max-new-tokens"),
        (("composed", "ab", "--plot", "no/such/folder/x.png"), 1, "FileNotFoundError"),
    ],
)
def test_wrong_use_is_named(base, saved, here, words, status, said):
    (here / "empty").mkdir()
    shutil.copytree(saved, here / "composed")
    done = call("explain", *words, "--base", base)
    assert (done.exit_code, done.stdout) == (status, "")
    assert said in " ".join(done.stderr.split())
