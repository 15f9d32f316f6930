"""The thread that owns the model: who runs, who waits, who leaves, and whom a failure ends."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from installed import needs_entry
from served_rows import (
    MIXTURES,
    PROMPTS,
    Heard,
    alone,
    averaged,
    heard_rows,
    long_row,
    require_alone,
    routed,
    served,
    wait_for,
)

import loraweave as lw
from loraweave.serving.batch import Sampling
from loraweave.serving.limits import Limits, Refusal
from loraweave.serving.names import Served
from loraweave.serving.scheduler import Metrics, Scheduler

batch_invariant = needs_entry("kernels", "fixed_shape")


@pytest.fixture
def setting(make_model, make_adapters, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    adapters = make_adapters(model, "llama")
    return lw.Composer(model, adapters, tokenizer=tokenizer), adapters


@pytest.fixture
def make_scheduler(setting, tokenizer):
    """make_scheduler(rows=2): a running scheduler of these limits, closed at the test's end."""
    made = []

    def make(**limits):
        made.append(Scheduler(setting[0].model, tokenizer, Limits(**limits), Metrics()))
        made[-1].start()
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


@pytest.fixture
def held(setting):
    """While cleared, the model waits before each call: `held.set()` lets it go on."""
    free = threading.Event()

    def wait(*call):
        assert free.wait(60)

    handle = setting[0].model.register_forward_pre_hook(wait)
    yield free
    free.set()
    handle.remove()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_answer_as_alone_whatever_the_size_of_the_batch(setting, tokenizer, make_scheduler, rows):
    heard = heard_rows(tokenizer, setting[1])
    scheduler = make_scheduler(rows=rows)
    for each in heard:
        scheduler.submit([each.row])
    wait_for(heard)
    require_alone(setting[0], heard)


def test_a_batch_keeps_to_its_tokens(setting, tokenizer, make_scheduler):
    widths = []
    hook = setting[0].model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["attention_mask"].shape), with_kwargs=True
    )
    heard = heard_rows(tokenizer, setting[1])
    scheduler = make_scheduler(rows=5, cache_tokens=60)
    scheduler.submit([each.row for each in heard])
    wait_for(heard)
    hook.remove()
    assert max(rows * columns for rows, columns in widths) <= 60
    assert max(rows for rows, _ in widths) > 1
    require_alone(setting[0], heard)


def test_a_row_that_can_never_fit_is_refused(setting, tokenizer, make_scheduler):
    scheduler = make_scheduler(cache_tokens=30)
    with pytest.raises(Refusal, match="up to 43 tokens, and this server keeps 30") as refused:
        scheduler.submit([long_row(tokenizer, setting[1]).row])
    assert refused.value.status == 413


def test_rows_beyond_the_queue_are_refused_all_or_none(setting, tokenizer, make_scheduler, held):
    scheduler = make_scheduler(rows=1, waiting=2)
    first = long_row(tokenizer, setting[1])
    scheduler.submit([first.row])
    more = [long_row(tokenizer, setting[1], tokens=2) for _ in range(3)]
    with pytest.raises(Refusal) as refused:
        scheduler.submit([each.row for each in more])
    assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
    held.set()
    wait_for([first])
    assert [each.events for each in more] == [[], [], []]


def test_a_client_that_goes_frees_its_place_and_changes_nothing_for_the_others(setting, tokenizer, make_scheduler, held):
    heard = heard_rows(tokenizer, setting[1])
    leaving, waiting = long_row(tokenizer, setting[1]), long_row(tokenizer, setting[1])
    scheduler = make_scheduler(rows=3)
    scheduler.submit([leaving.row, heard[0].row, heard[1].row])
    scheduler.submit([waiting.row, *(each.row for each in heard[2:])])
    leaving.row.gone = waiting.row.gone = True
    scheduler.wake()
    held.set()
    wait_for([*heard, leaving, waiting])
    require_alone(setting[0], heard)
    assert len(leaving.events) <= 1
    assert waiting.events == []


def test_a_row_beyond_its_deadline_ends_with_an_error(setting, tokenizer, make_scheduler):
    late = Heard(tokenizer, "abc", served(setting[1], {}), Sampling(9), deadline=time.monotonic() - 1)
    scheduler = make_scheduler()
    scheduler.submit([late.row])
    wait_for([late])
    assert (late.error.status, late.error.code) == (504, "deadline_exceeded")


def test_a_row_on_which_the_model_fails_while_it_reads_fails_alone(setting, tokenizer, make_scheduler, held):
    engine, adapters = setting
    bad = Heard(tokenizer, "Y", served(adapters, {"a": 1.0}), Sampling(9, temperature=0.0))
    poison = bad.row.prompts[0][0]
    assert all(poison not in tokenizer(prompt)["input_ids"] for prompt in PROMPTS)

    def fail(module, args, kwargs):
        if bool((kwargs["input_ids"] == poison).any()):
            raise RuntimeError("the model failed")

    hook = engine.model.register_forward_pre_hook(fail, with_kwargs=True)
    heard = heard_rows(tokenizer, adapters)
    scheduler = make_scheduler()
    scheduler.submit([heard[0].row, heard[1].row, bad.row])
    scheduler.submit([each.row for each in heard[2:]])
    held.set()
    wait_for([*heard, bad])
    hook.remove()
    assert str(bad.error) == "the model failed"
    require_alone(engine, heard)


def test_after_a_step_that_fails_every_row_goes_on_as_alone(setting, tokenizer, make_scheduler):
    engine, adapters = setting
    heard = heard_rows(tokenizer, adapters)
    calls = []

    def fail_once(module, args, kwargs):
        calls.append(kwargs["input_ids"].shape)
        if len(calls) == 3:
            # midway, with the new keys of the first layers in the cache
            raise RuntimeError("the model failed")

    hook = engine.model.model.layers[1].register_forward_pre_hook(
        lambda module, args: fail_once(module, args, {"input_ids": args[0]})
    )
    scheduler = make_scheduler()
    scheduler.submit([each.row for each in heard])
    wait_for(heard)
    hook.remove()
    require_alone(engine, heard)


def test_an_adapter_that_does_not_fit_ends_its_row_alone(setting, tokenizer, make_scheduler, make_adapter):
    engine, adapters = setting
    wide = lw.Adapter("wide", "tiny", {"model.layers.0.self_attn.q_proj": lw.Factors(torch.ones(1, 99), torch.ones(16, 1))})
    bad = Heard(tokenizer, "abc", served([wide], {"wide": 1.0}), Sampling(9))
    huge = Heard(tokenizer, "abc", served(adapters, {"a": 1e300}), Sampling(9))
    heard = heard_rows(tokenizer, adapters)
    scheduler = make_scheduler()
    scheduler.submit([heard[0].row, bad.row, huge.row, *(each.row for each in heard[1:])])
    wait_for([*heard, bad, huge])
    assert isinstance(bad.error, lw.LayerMismatch)
    assert isinstance(huge.error, lw.WeightingError)
    require_alone(engine, heard)


@pytest.mark.parametrize("changed", [{"rows": 0}, {"seconds": float("nan")}, {"adapters": -1}])
def test_a_limit_that_admits_nothing_is_refused(changed):
    with pytest.raises(ValueError, match=f"the limit '{next(iter(changed))}' is"):
        Limits(**changed)


def test_closing_ends_every_row_and_later_ones_are_refused(setting, tokenizer, make_scheduler, held):
    scheduler = make_scheduler(rows=1)
    rows = [long_row(tokenizer, setting[1]) for _ in range(2)]
    scheduler.submit([each.row for each in rows])
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    held.set()
    closing.join(60)
    assert [each.error.status for each in rows] == [503, 503]
    assert not scheduler.alive
    with pytest.raises(Refusal, match="stopping"):
        scheduler.submit([rows[0].row])


@pytest.fixture
def routers(setting):
    """One that looks at each token alone, and one that keeps the text of its row beside the cache."""
    pool = setting[0].pool
    examples = {"a": ["abc"], "b": ["zebra 12"], "c": ["OPA?"]}
    options = {"examples": examples, "embedder": "hashing", "per": "token", "template": None}
    return [lw.router("arrow", pool, top_k=1), lw.router("similarity", pool, temperature=0.5, **options)]


def test_rows_of_sums_routers_and_averages_each_answer_as_alone(setting, tokenizer, make_scheduler, routers):
    engine, adapters = setting
    greedy = Sampling(9, temperature=0.0)
    heard = heard_rows(tokenizer, adapters)
    by_router = [
        (Heard(tokenizer, prompt, routed(engine, router), greedy), prompt, router)
        for router in routers
        for prompt in PROMPTS[:3]
    ]
    shares, mixtures = [0.2, 0.3, 0.5], [{"a": 1.0}, {}, {"b": 0.7, "c": -0.4}]
    members = [replace(served(adapters, weights), share=s) for weights, s in zip(mixtures, shares, strict=True)]
    average = Served("@x", "@x", averaged=tuple(members))
    together = [(Heard(tokenizer, prompt, average, greedy), prompt) for prompt in PROMPTS]
    scheduler = make_scheduler(rows=6)
    for each in (*heard, *(each for each, *_ in by_router), *(each for each, _ in together)):
        scheduler.submit([each.row])
    wait_for([*heard, *(each for each, *_ in by_router), *(each for each, _ in together)])
    require_alone(engine, heard)
    for each, prompt, router in by_router:
        assert each.error is None
        assert each.text == alone(engine, prompt, router)[0]
    for each, prompt in together:
        assert each.text == averaged(engine, [prompt] * 3, mixtures, shares)


def test_an_average_of_more_prompts_than_there_are_rows_is_refused(setting, tokenizer, make_scheduler):
    average = Served("@x", "@x", averaged=(Served(), Served(), Served()))
    with pytest.raises(Refusal, match="asks 3 prompts at once, above --rows 2") as refused:
        make_scheduler(rows=2).submit([Heard(tokenizer, "abc", average, Sampling(2)).row])
    assert refused.value.status == 413


@batch_invariant
def test_batch_invariant_answers_have_the_same_bits_alone_and_in_a_busy_batch(setting, tokenizer, make_scheduler):
    adapters = setting[1]

    def asked():
        return [
            Heard(tokenizer, prompt, served(adapters, weights), Sampling(6, temperature=0.0))
            for prompt, weights in zip(PROMPTS, MIXTURES, strict=False)
        ]

    scheduler = make_scheduler(rows=4, batch_invariant=True, prefix_bytes=0)
    alone_in_it, together = asked(), asked()
    for each in alone_in_it:
        scheduler.submit([each.row])
        wait_for([each])
    scheduler.submit([each.row for each in together])
    wait_for(together)
    for one, other in zip(alone_in_it, together, strict=True):
        assert one.error is None
        assert one.text == other.text
        assert one.logprobs == other.logprobs


@batch_invariant
def test_a_batch_invariant_server_loads_nothing_that_weighs_tokens_apart(setting, make_scheduler, routers):
    engine, adapters = setting
    activated = replace(adapters[0], invocation=(1, 2))
    late = served([activated, adapters[1]], {"a": 0.5, "b": 0.5})
    by_router = routed(engine, routers[0])
    then = Served("then", "then", before=(served(adapters, {"b": 1.0}), late))
    scheduler = make_scheduler(batch_invariant=True)
    counts = "adapter 'a' acts only from its invocation tokens on"
    said = {late: counts, then: counts, by_router: f"router '{routers[0].name}' weighs each token"}
    for asked, why in said.items():
        with pytest.raises(Refusal, match=f"{why}, .* without --batch-invariant") as refused:
            scheduler.prepare(asked)
        assert (refused.value.status, refused.value.body["error"]["param"]) == (400, "model")
        assert scheduler.experts.hold(asked.identity) is None
    both = served(adapters, {"a": 0.5, "b": 0.5})
    scheduler.prepare(both)
    assert scheduler.experts.hold(both.identity) is both
