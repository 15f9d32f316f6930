"""explain() of an engine and of a composition: which token, layer and expert a weight belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loraweave as lw
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.report import Report
from loraweave.composer.composer import Composer
from loraweave.errors import AlreadyActive, CompositionError, ScopeError
from loraweave.extensions.explain.reading import explain, split_text
from loraweave.hub.pool import ExpertPool
from loraweave.types import Task

TEXT = "abc: de"
Make = Callable[..., Any]


class ByInput:
    """A router: the first features of each token, by layer in what it saw last."""

    def __init__(self, num_experts: int = 3) -> None:
        self.num_experts = num_experts
        self.given: dict[str, list[Tensor]] = {}

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        w_BTE = x_BTI[..., : self.num_experts].float()
        self.given.setdefault(layer, []).append(w_BTE)
        return w_BTE


def engine_for(kind: str, make_model: Make, make_adapter: Make, tokenizer: Any) -> Composer:
    model = make_model(kind)
    targets = {"llama": ("q_proj", "down_proj", "lm_head"), "t5": ("q", "k", "v", "wo"), "bert": ("query", "dense")}[kind]
    return Composer(
        model,
        [make_adapter(model, name, targets=targets, seed=seed) for seed, name in enumerate("abc")],
        tokenizer=tokenizer,
    )


@pytest.fixture
def engine(make_model: Make, make_adapter: Make, tokenizer: Any) -> Composer:
    return engine_for("llama", make_model, make_adapter, tokenizer)


def test_a_fixed_mixture_is_the_same_for_all_tokens_and_layers(engine: Composer) -> None:
    found = explain(engine, TEXT, {"a": 0.5, "b": -1.0})
    assert found.tokens == tuple(TEXT)
    assert found.experts == ("a", "b")
    assert found.layers == tuple(name for name, _ in engine.model.named_modules() if name in engine.target_layers)
    assert torch.equal(found.w_TLE, torch.tensor([0.5, -1.0]).expand(len(TEXT), len(found.layers), 2))


def test_a_mixture_of_one_row_is_explained_like_that_of_all(engine: Composer) -> None:
    assert explain(engine, TEXT, [{"a": 0.5, "b": -1.0}]).to_json() == explain(engine, TEXT, {"a": 0.5, "b": -1.0}).to_json()


def test_a_layer_that_an_expert_leaves_alone_has_no_weight_of_it(
    tiny_llama: nn.Module, make_adapters: Make, tokenizer: Any
) -> None:
    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"), tokenizer=tokenizer)
    found = explain(engine, TEXT, {"a": 0.5, "b": 1.0})
    for at, layer in enumerate(found.layers):
        expected = [0.5 * (layer in engine.pool["a"].layers), 1.0 * (layer in engine.pool["b"].layers)]
        assert found.w_TLE[0, at].tolist() == expected


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_routers_weights_are_found_at_their_tokens(
    kind: str, make_model: Make, make_adapter: Make, tokenizer: Any
) -> None:
    engine = engine_for(kind, make_model, make_adapter, tokenizer)
    router = ByInput()
    found = explain(engine, TEXT, router)
    seen = 0
    for at, layer in enumerate(found.layers):
        [given] = router.given[layer]
        # bert's head sees its first token only
        if given.shape[:2] == (1, len(TEXT)):
            assert torch.equal(found.w_TLE[:, at], given[0])
            seen += 1
    assert seen >= 4


def test_what_is_active_is_explained_without_a_mixture(engine: Composer) -> None:
    with engine.activate({"c": 2.0}):
        assert explain(engine, TEXT).experts == ("c",)
    assert explain(engine, TEXT).experts == ()
    assert not engine.active


def test_generated_tokens_have_the_weights_that_they_were_generated_with(engine: Composer) -> None:
    router = ByInput()
    with engine.activate(router):
        batch = {"input_ids": torch.tensor([engine.tokenizer(TEXT)["input_ids"]])}
        ids_BT = engine.model.generate(**batch, max_new_tokens=5, do_sample=False)
    generated = {layer: torch.cat(parts, dim=1) for layer, parts in router.given.items()}
    found = explain(engine, TEXT, ByInput(), max_new_tokens=5)
    assert "".join(found.tokens) == engine.tokenizer.decode(ids_BT[0, :-1])
    assert len(found.tokens) > len(TEXT)
    for at, layer in enumerate(found.layers):
        # in generate, the head sees the last token of the prompt only
        count = generated[layer].shape[1]
        assert torch.allclose(found.w_TLE[-count:, at], generated[layer][0], atol=1e-4)


@pytest.mark.parametrize("text", [TEXT, "a", ""])
@pytest.mark.parametrize("max_new_tokens", [0, 1, 4])
def test_an_encoder_decoders_layers_are_found_at_the_tokens_that_they_see(
    text: str, max_new_tokens: int, make_model: Make, make_adapter: Make, tokenizer: Any
) -> None:
    engine = engine_for("t5", make_model, make_adapter, tokenizer)
    # a text that is as long as its answer is the hard case
    engine.model.generation_config.eos_token_id = None
    found = explain(engine, text, {"a": 1.0}, max_new_tokens=max_new_tokens)
    num_text, num_answer = max(len(text), 1), max(max_new_tokens, 1)
    assert len(found.tokens) == num_text + num_answer
    assert found.tokens[num_text] == "<pad>"
    for at, layer in enumerate(found.layers):
        from_text = layer.startswith("encoder") or layer.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        seen = [not bool(value) for value in found.w_TLE[:, at, 0].isnan()]
        assert seen == [from_text] * num_text + [not from_text] * num_answer, layer


def test_wrong_use_is_named_before_the_model_runs(engine: Composer, tiny_llama: nn.Module, make_adapters: Make) -> None:
    with pytest.raises(CompositionError, match="takes one text or conversation at a time: text 0 is 5"):
        explain(engine, 5, {"a": 1.0})  # type: ignore[arg-type]
    with pytest.raises(CompositionError, match="takes one text or conversation at a time"):
        explain(engine, [TEXT], {"a": 1.0})  # type: ignore[arg-type]
    with pytest.raises(CompositionError, match=r"needs a tokenizer"):
        explain(Composer(tiny_llama, make_adapters(tiny_llama, "llama")), TEXT, {"a": 1.0})
    with pytest.raises(ScopeError, match="2 rows"):
        explain(engine, TEXT, [{"a": 1.0}, None])
    with engine.fused({"a": 1.0}), pytest.raises(AlreadyActive, match="fused into the weights"):
        explain(engine, TEXT)
    engine.close()
    with pytest.raises(CompositionError, match="closed"):
        explain(engine, TEXT, {"a": 1.0})


@pytest.fixture
def composed(tiny_llama: nn.Module, make_adapters: Make, tokenizer: Any) -> Composition:
    pool = ExpertPool(make_adapters(tiny_llama, "llama"))
    task = Task([("ab", "c")], instruction="do")
    report = Report((), "manual", "as asked", (), 0.0, 0)
    weights = {"a": 0.25, "b": 0.0, "c": -1.0}
    return Composition(tiny_llama, tokenizer, task, pool, weights, "linear", report)


def test_a_composition_is_explained_by_its_weights_over_its_prompt(composed: Composition, tmp_path: Any) -> None:
    found = explain(composed, "de")
    assert "".join(found.tokens) == composed.tokenizer.decode(composed.tokenizer(composed.task.prompt("de"))["input_ids"])
    assert found.experts == ("a", "c")
    assert set(found.layers) == set(composed.adapter.layers)
    assert torch.equal(found.w_TLE, torch.tensor([0.25, -1.0]).expand(len(found.tokens), len(found.layers), 2))
    # saved and read again it says the same, without the pool
    again = Composition.from_pretrained(composed.save_pretrained(tmp_path / "c"), composed.model, composed.tokenizer)
    assert explain(again, "de").to_json() == found.to_json()


def test_a_composition_that_is_the_base_has_tokens_and_no_expert(composed: Composition) -> None:
    base = Composition(composed.model, composed.tokenizer, composed.task, None, {}, "linear", composed.report)
    found = explain(base, "de", max_new_tokens=3)
    assert (found.experts, found.layers) == ((), ())
    assert len(found.tokens) > len(composed.task.prompt("de"))


def test_what_each_expert_is_worth_goes_into_the_explanation(engine: Composer) -> None:
    effects = engine.leave_one_out(Task([("ab", "c")]), {"a": 0.5, "b": -1.0}, progress=False)
    assert explain(engine, TEXT, {"a": 0.5, "b": -1.0}).with_effects(effects).effects == effects


def test_a_composition_brings_its_own_mixture(composed: Composition) -> None:
    with pytest.raises(CompositionError, match=r"composition\.engine"):
        explain(composed, "de", {"a": 1.0})


def test_a_composition_by_a_router_is_explained_by_the_router(composed: Composition) -> None:
    made = lw.router("arrow", composed.pool)
    routed = Composition.of(composed.model, composed.tokenizer, composed.task, made, pool=composed.pool)
    expected = explain(routed.engine, composed.task.prompt("a b"), made)
    assert explain(routed, "a b").experts == ("a", "b", "c")
    assert torch.equal(explain(routed, "a b").w_TLE, expected.w_TLE)


def test_a_composition_by_layer_has_each_layers_weights_and_a_tuned_one_is_one_adapter(
    composed: Composition, tmp_path: Path
) -> None:
    layers = sorted({layer for adapter in composed.pool.adapters.values() for layer in adapter.layers})
    by_layer = {layer: {"a": 1.0 + number, "b": 0.0, "c": 0.0} for number, layer in enumerate(layers)}
    means = {"a": 1 + (len(layers) - 1) / 2, "b": 0.0, "c": 0.0}
    found = explain(replace(composed, all_weights=means, by_layer=by_layer), "de")
    assert found.w_TLE[0, found.layers.index(layers[2]), 0] == 3.0
    tuned = composed.tune(1, progress=False)
    again = Composition.from_pretrained(tuned.save_pretrained(tmp_path / "kept"), tuned.model, tuned.tokenizer)
    assert explain(again, "de").experts == explain(tuned, "de").experts == ("composition",)


def test_an_average_is_explained_member_by_member(composed: Composition) -> None:
    base = Composition.of(composed.model, composed.tokenizer, composed.task)
    average = Composition.of(composed.model, composed.tokenizer, composed.task, {"mixed": composed, "base": base})
    with pytest.raises(ScopeError, match=r"mixed and base cannot .*members\['base'\]"):
        explain(average, "a")


def test_a_conversation_is_explained_as_the_template_shows_it(engine: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}a: "
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "ab"}, {"role": "user", "content": "b"}]
    assert "".join(explain(engine, turns, {"a": 1.0}).tokens) == "u: a\na: ab\nu: b\na: "
    with pytest.raises(CompositionError, match="ends with the assistant's turn"):
        explain(engine, turns[:2], {"a": 1.0})


@pytest.mark.parametrize("per", ["row", "token"])
def test_the_prompt_and_the_answer_have_the_weights_of_generating(engine: Composer, per: str) -> None:
    examples = {"a": ["red apple", "green apple"], "b": ["one two three", "four"], "c": ["paris in france"]}
    options = {"examples": examples, "embedder": "hashing", "per": per, "temperature": 0.05, "refresh": 1}
    router = lw.router("similarity", engine.pool, **options)
    ids = engine.tokenizer("an apple")["input_ids"]
    found = explain(engine, "an apple", router, max_new_tokens=5)
    with torch.no_grad(), engine.activate(router), engine.record() as trace:
        engine.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    layer = found.layers[0]
    w_TE = torch.cat([call.w_BTE[0].expand(1 if i else len(ids), 3) for i, call in enumerate(trace.calls(layer))])
    assert torch.allclose(found.w_TLE[:, 0], w_TE, atol=1e-6)


def test_tokens_that_share_a_character_all_show_it() -> None:
    class Bytes:
        """A token for every byte."""

        def decode(self, ids: list[int], **settings: Any) -> str:
            return bytes(ids).decode(errors="replace")

    ids = list("aé的😀b".encode())
    assert split_text(Bytes(), ids) == ("a", *["é"] * 2, *["的"] * 3, *["😀"] * 4, "b")
    assert split_text(Bytes(), ids[:2]) == ("a", "�")
    assert split_text(Bytes(), [0xE7, 97, 98]) == ("�", "a", "b")
