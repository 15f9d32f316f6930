"""`loraweave explain`: its table, its JSON, the files that it writes, and what it refuses."""

import json
import shlex
import shutil

import pytest
import torch
from command_line import LAYERS, call, cells

import loraweave as lw
from loraweave.types import Factors

TASK = lw.Task([("ab", "c")], instruction="Once.")


def pool_of(base):
    layers = {layer: Factors(torch.ones(2, 16), torch.ones(16, 2)) for layer in LAYERS}
    return lw.ExpertPool([lw.Adapter(name, str(base), layers) for name in ("[left]", "$right")])


def composed(base, folder, weights):
    model, tokenizer = lw.load_base(str(base))
    pool = pool_of(base)
    method = "manual" if weights else "base"
    made = lw.compose(model, tokenizer, pool, TASK, method=method, weights=weights or None, progress=False)
    return made.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    return composed(base, tmp_path_factory.mktemp("c") / "composed", {"[left]": 0.75, "$right": -0.25})


def test_the_table_has_the_adapters_by_their_share(saved, here):
    done = call("explain", saved, "ab")
    assert done.exit_code == 0, done.stderr
    rows = [cells(line)[:4] for line in done.stdout.splitlines()]
    assert rows[-2:] == [["[left]", "75.0%", "100.0%", "0.75"], ["$right", "25.0%", "100.0%", "-0.25"]]


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


@pytest.mark.parametrize(
    ("flag", "file", "said", "holds"),
    [("--plot", "weights.svg", "drew", "<svg"), ("--page", "weights.html", "wrote", "<!doctype html>")],
)
def test_plot_and_page_are_written_where_they_are_wanted(flag, file, said, holds, saved, here):
    done = call("explain", saved, "ab", flag, file)
    assert (done.exit_code, done.stderr) == (0, f"{said} {file}\n")
    assert holds in (here / file).read_text(encoding="utf-8")


def test_the_base_model_has_a_table_and_no_picture(base, here):
    folder = composed(base, here / "c", {})
    assert "the base model itself" in call("explain", folder, "ab").stdout
    done = call("explain", folder, "ab", "--plot", "x.png")
    assert (done.exit_code, done.stderr.split(":")[0]) == (1, "CompositionError")
    assert not (here / "x.png").exists()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("nowhere", "ab"), 2, "'nowhere' does not exist"),
        (("empty", "ab"), 1, "AdapterNotFound: empty holds no composition.json"),
        (("composed",), 2, "TEXT is missing"),
        (("composed", "ab", "--plot", "x.bmp2"), 2, "ends in .png, .svg, .pdf, not 'x.bmp2'"),
        (("composed", "ab", "--page", "x.png"), 2, "ends in .html, not 'x.png'"),
        (("composed", "ab", "--max-new-tokens", "-1"), 2, "--max-new-tokens"),
        (("composed", "ab", "--plot", "no/such/folder/x.png"), 1, "FileNotFoundError"),
    ],
)
def test_a_wrong_use_of_explain_is_named(base, saved, here, words, status, said):
    (here / "empty").mkdir()
    shutil.copytree(saved, here / "composed")
    done = call("explain", *words, "--base", base)
    assert (done.exit_code, done.stdout) == (status, "")
    assert said in " ".join(done.stderr.split())


def test_a_composition_by_a_router_has_the_experts_of_its_pool(base, here):
    model, tokenizer = lw.load_base(str(base))
    pool = pool_of(base)
    made = lw.Composition.of(model, tokenizer, TASK, lw.router("arrow", pool), pool=pool)
    folder = made.save_pretrained(here / "c")
    assert json.loads(call("explain", folder, "a text", "--json").stdout)["experts"] == ["[left]", "$right"]


def test_an_average_is_answered_with_commands_that_explain_its_members(base, here):
    model, tokenizer = lw.load_base(str(base))
    members = {name: lw.Composition.of(model, tokenizer, TASK, adapter) for name, adapter in pool_of(base).adapters.items()}
    lw.Composition.of(model, tokenizer, TASK, members).save_pretrained(here / "my average")
    refused = call("explain", "my average", "a b")
    assert (refused.exit_code, refused.stderr.split(":")[0]) == (1, "ScopeError"), refused.stderr
    commands = [shlex.split(text)[1:] for text in refused.stderr.split("`")[1::2]]
    assert commands == [["explain", f"my average/member-{number}", "a b"] for number in range(2)]
    assert [call(*words).exit_code for words in commands] == [0, 0]


def test_a_damaged_composition_is_named_before_the_base_is_loaded(here):
    (here / "broken").mkdir()
    (here / "broken/composition.json").write_text('{"format": 2, "base_model": "no/such-base"}')
    for more in ([], ["--base", "no/such-base"]):
        done = call("explain", "broken", "a", *more)
        assert (done.exit_code, done.stderr.split(":")[0]) == (1, "AdapterCorrupt"), done.stderr
