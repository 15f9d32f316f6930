"""Heads by hand: names of every age, what is refused, and what is written so that peft loads it. See test_peft.py too."""

from dataclasses import replace

import peft
import pytest
import torch
from peft_models import PREFIX, lora, put
from torch import nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._contents import Contents
from loraweave.hub.formats.peft import Peft
from loraweave.types import Factors

LAYER = "model.layers.0.self_attn.q_proj"
HEAD = torch.arange(6.0).reshape(2, 3)


def folder_of(path, config=None, **extra):
    return put(
        path, lora(LAYER, a=torch.ones(2, 5), b=torch.ones(3, 2)) | extra, **{"modules_to_save": ["score"], **(config or {})}
    )


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
    zero = {f"{PREFIX}{LAYER}.lora_B.weight": torch.zeros(3, 2), "score.weight": HEAD}
    contents = Peft.read(folder_of(tmp_path / "a", **zero))
    assert list(Peft.read(Peft.write(contents, tmp_path / "b")).heads) == ["score.weight"]


def test_heads_change_the_hash(tmp_path):
    adapter = Adapter.from_pretrained(folder_of(tmp_path / "a", **{"score.weight": HEAD}))
    other = Adapter.from_pretrained(folder_of(tmp_path / "b", **{"score.weight": HEAD + 1}))
    assert len({adapter.hash, other.hash, replace(adapter, heads={}).hash}) == 3


def test_card_names_the_heads(tmp_path):
    Peft.write(Peft.read(folder_of(tmp_path / "a", **{"score.weight": HEAD})), tmp_path / "b")
    assert "- Trained heads: score.weight" in (tmp_path / "b" / "README.md").read_text()


SCORE, UNLISTED = {"score.weight": HEAD}, {"modules_to_save": None}
ORIGINAL = {**SCORE, "score.original_module.weight": HEAD + 1}
CORRUPT = {
    "listed head is missing": ({}, {}, "modules_to_save lists 'score'"),
    "one of two listed heads is missing": ({"modules_to_save": ["score", "lm_head"]}, SCORE, "'lm_head'"),
    "every head of a task is missing": (
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]},
        {},
        "'classifier'",
    ),
    "one head twice": ({}, {**SCORE, "score.modules_to_save.weight": HEAD + 1}, "several tensors are the head"),
    "head of nothing": ({}, {"score.weight": torch.zeros(0, 3)}, "holds nothing"),
    "NaN": ({}, {"score.weight": torch.full((2, 3), float("nan"))}, "6 of 6 .*'score.weight'"),
    "names of a wrong type": ({"modules_to_save": "score"}, SCORE, "modules_to_save is 'score'"),
    "empty name": ({"modules_to_save": [""]}, SCORE, "modules_to_save"),
}
UNSUPPORTED = {
    "head that is not listed": (UNLISTED, SCORE, "does not list it"),
    "inner name that is not listed": (UNLISTED, {"x.modules_to_save.default.weight": HEAD}, "does not list"),
    "another adapter's copy": (
        {},
        {"score.modules_to_save.other.weight": HEAD},
        "score.modules_to_save.other.weight",
    ),
    "copy of the base's": ({}, ORIGINAL, "original_module"),
    "the base's weight next to every bias": ({"bias": "all"}, ORIGINAL, "original_module"),
    "update within a head": (
        {},
        {"score.lora_A.weight": HEAD, "score.lora_B.weight": HEAD + 1, "score.weight": HEAD + 2},
        r"score\.lora_",
    ),
    "name that ends a factor's": ({"modules_to_save": ["A"]}, {}, r"q_proj\.lora_A"),
    "whole numbers": ({}, {"score.num_batches": torch.ones(2, dtype=torch.int64)}, "I64"),
    "heads alone": ({}, {**dict.fromkeys(lora(LAYER)), **SCORE}, "no low-rank update"),
}


@pytest.mark.parametrize("case", [*CORRUPT, *UNSUPPORTED])
def test_head_that_is_not_exactly_understood_is_refused(tmp_path, case):
    config, extra, message = CORRUPT.get(case) or UNSUPPORTED[case]
    with pytest.raises(AdapterCorrupt if case in CORRUPT else AdapterUnsupported, match=message):
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
        self.inner = nn.ModuleDict({"a_b": nn.Linear(4, 2)})

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
