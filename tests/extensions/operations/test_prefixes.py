"""Beginnings that are kept: which rows begin with them, and that their answers are those of the rows alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import takewhile

import pytest
import torch
from served_rows import MIXTURES, Heard, alone, finish, heard_rows, join, make_batch, routed, served, wait_for

import loraweave as lw
from loraweave.extensions.operations import KeptPrefixes
from loraweave.extensions.operations.prefixes import states_of
from loraweave.serving.batch import Sampling
from loraweave.serving.limits import Limits
from loraweave.serving.scheduler import Metrics, Scheduler

GREEDY = Sampling(9, temperature=0.0, logprobs=2)


@pytest.fixture(params=["llama", "gpt2"])
def setting(request, make_model, make_adapters, tokenizer):
    """(engine, adapters) in float64, where no rounding hides a difference."""
    model = make_model(request.param, dtype=torch.float64)
    adapters = make_adapters(model, request.param)
    return lw.Composer(model, adapters, tokenizer=tokenizer), adapters


@pytest.fixture
def make_scheduler(setting, tokenizer):
    """make_scheduler(rows=2): a running scheduler that keeps beginnings, of these limits, closed at the test's end."""
    made = []

    def make(**limits):
        prefixes = KeptPrefixes(1 << 28)
        made.append(Scheduler(setting[0].model, tokenizer, Limits(**limits), Metrics(), prefixes=prefixes))
        made[-1].start()
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


def test_what_was_read_under_the_same_weights_is_not_read_again(setting, tokenizer):
    engine, adapters = setting
    batch, experts = make_batch(engine.model, tokenizer, prefixes=KeptPrefixes(1 << 20))
    prompts = ["the judge thanked: ", "the judge thanked: zebra 12", "the judge thought: zebra"]
    first = [Heard(tokenizer, prompts[0], served(adapters, weights), GREEDY) for weights in (MIXTURES[2], MIXTURES[0])]
    join(batch, experts, first)
    finish(batch)
    turn = prompts[0] + first[0].text + " and "
    asked = [(turn, MIXTURES[2]), (prompts[1], MIXTURES[2]), (prompts[2], MIXTURES[2]), (turn, MIXTURES[4]), ("b", {})]
    later = [Heard(tokenizer, prompt, served(adapters, weights), GREEDY) for prompt, weights in asked]
    widths = []
    hook = engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    join(batch, experts, later[:3])
    join(batch, experts, later[3:])
    hook.remove()
    counts = {prompt: len(tokenizer(prompt)["input_ids"]) for prompt, _ in asked}
    read = [each.row.num_kept for each in later]
    # of the answer all but the last token was read
    begun = list(
        takewhile(lambda pair: pair[0] == pair[1], zip(first[0].row.ids[0][:-1], later[0].row.prompts[0], strict=False))
    )
    assert read[0] == len(begun) >= len(first[0].row.prompts[0])
    assert read[1] == len(tokenizer(prompts[0])["input_ids"])
    assert read[2:] == [0, 0, 0]
    assert widths == [counts[prompts[2]], counts[turn]]
    finish(batch)
    for each, (prompt, weights) in zip(later, asked, strict=True):
        text, logprobs = alone(engine, prompt, weights)
        assert each.text == text
        assert each.logprobs == pytest.approx(logprobs, abs=1e-5)


def test_rows_of_activated_adapters_begin_with_what_the_base_has_read(setting, tokenizer):
    engine, adapters = setting
    invocations = {"a": "ask: ", "b": "12: ", "c": ""}
    mine = [replace(adapter, invocation=tuple(tokenizer(invocations[adapter.name])["input_ids"])) for adapter in adapters]
    activated = lw.Composer(engine.model, mine, tokenizer=tokenizer)
    batch, experts = make_batch(engine.model, tokenizer, prefixes=KeptPrefixes(1 << 20))
    text = "the judge thanked zebra and said nothing. "
    base = Heard(tokenizer, text + "so", served(mine, {}), GREEDY)
    join(batch, experts, [base])
    finish(batch)
    asked = [
        (text + "ask: ", {"a": 1.0}),
        (text + "12: yes", {"b": 0.7}),
        # the plain one counts from the beginning on
        (text + "ask: ", {"a": 1.0, "c": 1.0}),
        (text + "of nothing", {"b": 1.0}),
        (text + "12: ask: no", {"a": 0.5, "b": 0.5}),
    ]
    heard = [Heard(tokenizer, prompt, served(mine, weights), GREEDY) for prompt, weights in asked]
    join(batch, experts, heard[:3])
    batch.step()
    join(batch, experts, heard[3:])
    # the same prompt again, and one whose last invocation is a later one
    later = [(asked[0][0], asked[0][1]), (text + "ask: 9 ask: ", {"a": 1.0})]
    finish(batch)
    heard += [Heard(tokenizer, prompt, served(mine, weights), GREEDY) for prompt, weights in later]
    join(batch, experts, heard[5:])
    finish(batch)
    for each, (prompt, weights) in zip(heard, asked + later, strict=True):
        answer, logprobs = alone(activated, prompt, weights)
        assert each.text == answer
        assert each.logprobs == pytest.approx(logprobs, abs=1e-5)
    length, asking = len(tokenizer(text)["input_ids"]), len(tokenizer(asked[0][0])["input_ids"])
    kept = [each.row.num_kept for each in heard]
    assert kept[:2] == [length, length]
    assert kept[2:5] == [0, length, length]
    # all but the last token, and what stands before the first of both invocations
    assert kept[5:] == [asking - 1, length]


def test_what_is_kept_has_at_most_its_bytes(setting, tokenizer):
    engine, _ = setting
    prefixes = KeptPrefixes(1 << 15)
    batch, experts = make_batch(engine.model, tokenizer, prefixes=prefixes)
    kept = []
    for _ in range(3):
        for each in heard_rows(tokenizer, setting[1]):
            join(batch, experts, [each])
            finish(batch)
            kept.append(prefixes.kept_bytes)
    assert 0 < max(kept) <= 1 << 15
    assert len(set(kept)) > 1


def test_further_answers_to_a_prompt_begin_with_what_the_first_has_read(setting, tokenizer, make_scheduler):
    engine, adapters = setting
    composition = served(adapters, MIXTURES[2])
    prompt = "the judge thanked: zebra"
    heard = [Heard(tokenizer, prompt, composition, Sampling(9, temperature=0.9, seed=seed)) for seed in range(3)]
    make_scheduler(rows=3).submit([each.row for each in heard])
    wait_for(heard)
    num_tokens = len(heard[0].row.prompts[0])
    assert [each.row.num_kept for each in heard] == [0, num_tokens - 1, num_tokens - 1]
    drawn = [
        engine.generate(
            [prompt], mixture=MIXTURES[2], seeds=[seed], do_sample=True, temperature=0.9, top_k=0, max_new_tokens=9
        )
        for seed in range(3)
    ]
    assert [[each.text] for each in heard] == drawn


def test_what_was_read_under_a_router_is_kept_by_what_its_formula_says_and_does_not_keep_the_router(
    setting, tokenizer, make_scheduler
):
    engine, _ = setting
    examples = {"a": ["abc"], "b": ["zebra 12"], "c": ["OPA?"]}
    arrow = lw.router("arrow", engine.pool, top_k=1)
    similarity = lw.router(
        "similarity", engine.pool, temperature=0.5, examples=examples, embedder="hashing", per="token", template=None
    )
    prompt, scheduler, found = "the judge thanked: zebra", make_scheduler(), []
    for router in (arrow, copy.deepcopy(arrow)):
        heard = Heard(tokenizer, prompt, routed(engine, router), Sampling(9, temperature=0.0))
        assert states_of(heard.row) == [[(router.name, None)]]
        scheduler.submit([heard.row])
        wait_for([heard])
        found.append(heard)
    assert [each.row.num_kept for each in found] == [0, len(found[0].row.prompts[0]) - 1]
    assert found[0].text == found[1].text == alone(engine, prompt, arrow)[0]
    assert states_of(Heard(tokenizer, prompt, routed(engine, similarity), GREEDY).row) == [[(None, None)]]
