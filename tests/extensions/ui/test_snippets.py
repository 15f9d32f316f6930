"""The texts that the page offers to copy do what the page does."""

from __future__ import annotations

import copy
import json
import shlex
import urllib.request

import pytest
from command_line import call
from server_clients import running

import loraweave as lw
from loraweave.extensions.ui.snippets import SERVER, by_block, texts_of

MIXTURE, ROUTER = "0.25*past + 1.5*plural", "arrow(past, plural)"
CHAT = [{"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder whose name a shell must quote."""
    return tmp_path_factory.mktemp("it's here")


@pytest.fixture(scope="module")
def own(place, hub, tiny):
    with lw.Hub(place / "hub") as opened:
        for name in ("past", "plural"):
            opened.add(hub[name])
            opened.bind(name, tiny)
        yield opened


@pytest.fixture(scope="module")
def chatty(tokenizer):
    """The tokenizer with a chat template."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return made


@pytest.fixture(scope="module")
def base(place, tiny, chatty):
    tiny.save_pretrained(place / "base")
    chatty.save_pretrained(place / "base")
    return str(place / "base")


@pytest.mark.parametrize("formula", [MIXTURE, ROUTER])
@pytest.mark.parametrize("question", ["ab\n'c' \"d\"", CHAT])
def test_python_and_curl_have_the_answer_of_the_composition(own, base, tiny, chatty, formula, question, capsys):
    texts = texts_of(own, base, formula, question, 5)
    assert texts["formula"] == formula
    parsed = lw.parse(formula)
    engine = lw.Composer(tiny, parsed.pool(own), tokenizer=chatty)
    (said,) = engine.generate([question], mixture=parsed.mixture(own), max_new_tokens=5, do_sample=False)
    exec(texts["python"], {})
    assert capsys.readouterr().out == f"{said}\n"
    comment, command = texts["curl"].split("\n", 1)
    assert shlex.split(comment.partition(": ")[2]) == ["loraweave", "serve", "--hub", str(own.path), "--base", base]
    program, address, *rest = shlex.split(command)
    assert (program, rest[:-1]) == ("curl", ["-H", "Content-Type: application/json", "-d"])
    with running(own, tiny, chatty) as port:
        url = address.replace(SERVER, f"http://127.0.0.1:{port}/v1")
        sent = urllib.request.Request(url, rest[-1].encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(sent, timeout=60) as answer:
            choice = json.load(answer)["choices"][0]
    assert (choice["text"] if isinstance(question, str) else choice["message"]["content"]) == said


def test_python_of_weights_by_block_has_the_answer_of_these_weights(own, base, tiny, chatty, capsys):
    weights, block = {"past": 0.25, "plural": 1.5}, "model.layers.1"
    engine = lw.Composer(tiny, own.pool(list(weights)), tokenizer=chatty)
    by_layer = {
        layer: {**weights, "past": -2.0} if layer.startswith(f"{block}.") else weights for layer in engine.pool.layer_names
    }
    assert {row["past"] for row in by_layer.values()} == {0.25, -2.0}
    mixture = lw.MixtureWeights.of_layers(by_layer, list(weights))
    (said,) = engine.generate(["ab"], mixture=mixture, max_new_tokens=5, do_sample=False)
    assert said != engine.generate(["ab"], mixture=weights, max_new_tokens=5, do_sample=False)[0]
    exec(by_block(own, base, weights, {block: {"past": -2.0}}, "ab", 5), {})
    assert capsys.readouterr().out == f"{said}\n"


def test_the_shells_command_merges_a_mixture_and_keeps_a_router(own, here):
    program, *words = shlex.split(texts_of(own, None, MIXTURE, "a", 5)["shell"])
    assert (program, call(*words).exit_code) == ("loraweave", 0)
    assert (
        lw.Adapter.from_pretrained(here / "merged").layers.keys() == own["past"].layers.keys() | own["plural"].layers.keys()
    )
    program, *words = shlex.split(texts_of(own, None, ROUTER, "a", 5)["shell"])
    assert (program, call(*words).exit_code) == ("loraweave", 0)
    assert own.composition("routed").formula == ROUTER


def test_the_default_base_is_not_named(own):
    texts = texts_of(own, None, MIXTURE, "a", 5)
    assert "load_base()" in texts["python"]
    assert "--base" not in texts["curl"]
