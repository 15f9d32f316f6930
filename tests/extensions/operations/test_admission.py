"""Budgets of memory and of time: whose rows wait, what makes room, and what a step is predicted to take."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from served_rows import (
    MIXTURES,
    PROMPTS,
    Heard,
    finish,
    heard_rows,
    join,
    long_row,
    make_batch,
    require_alone,
    served,
    wait_for,
)

import loraweave as lw
from loraweave.errors import CompositionError
from loraweave.extensions.operations import Budgets, KeptPrefixes, StepTimes
from loraweave.serving.batch import Row, Sampling
from loraweave.serving.limits import Limits, Refusal
from loraweave.serving.scheduler import MOST_PASSED, Metrics, Scheduler


@pytest.fixture
def setting(make_model, make_adapters, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    adapters = make_adapters(model, "llama")
    return lw.Composer(model, adapters, tokenizer=tokenizer), adapters


@pytest.fixture
def make_scheduler(setting, tokenizer):
    """make_scheduler(rows=2): a running scheduler with budgets, of these limits, closed at the test's end."""
    made = []

    def make(**limits):
        made.append(Scheduler(setting[0].model, tokenizer, Limits(**limits), Metrics(), Budgets, KeptPrefixes(1 << 28)))
        made[-1].start()
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


@pytest.mark.parametrize("limit", ["memory_bytes", "token_seconds"])
def test_without_what_keeps_them_budgets_are_refused(setting, tokenizer, limit):
    with pytest.raises(CompositionError, match="which is not installed"):
        Scheduler(setting[0].model, tokenizer, Limits(**{limit: 1e6}), Metrics())


def unused_bytes(experts):
    return sum(loaded.size for loaded in experts.unused().values())


def test_rows_kept_beginnings_and_adapters_share_one_budget(setting, tokenizer, make_scheduler):
    engine, adapters = setting
    # the factors in fp32, and the engine's copy in float64
    sizes = {name: (4 + 8) * engine.pool[name].num_values for name in "abc"}
    # 2 layers, 2 heads of 4 numbers, keys and values, in float64
    token_bytes = 2 * 2 * 2 * 4 * 8
    rows = [row for _ in range(3) for row in heard_rows(tokenizer, adapters)]
    largest = max(each.row.longest for each in rows)
    scheduler = make_scheduler(rows=4, memory_bytes=2 * largest * token_bytes + 4 * sum(sizes.values()))
    # and the kernels' own in float64, too: a layer's matrix is so small that it may be multiplied out
    full = sum(layer.a_RI.shape[1] * layer.b_OR.shape[0] for layer in engine.pool["a"].layers.values())
    expected = rows[0].row.longest * token_bytes + sizes["a"] + 8 * full
    assert scheduler._admission.needed([rows[0].row]) == expected
    used, budgets, prefixes, experts = [], scheduler._admission, scheduler._prefixes, scheduler.experts
    hook = engine.model.register_forward_pre_hook(
        lambda module, args: used.append(budgets.needed(scheduler._running) + prefixes.kept_bytes + unused_bytes(experts))
    )
    for each in rows:
        scheduler.submit([each.row])
    wait_for(rows)
    hook.remove()
    scheduler.close()
    scheduler._admission.make_room([])
    assert max(used) <= scheduler._limits.memory_bytes
    assert scheduler._prefixes.kept_bytes + unused_bytes(scheduler.experts) <= scheduler._limits.memory_bytes
    for start in range(0, len(rows), len(MIXTURES)):
        require_alone(engine, rows[start : start + len(MIXTURES)])
    with pytest.raises(Refusal, match=rf"need up to \d+ bytes, and this server has {sizes['b']};") as refused:
        make_scheduler(memory_bytes=sizes["b"]).submit([long_row(tokenizer, adapters).row])
    assert refused.value.status == 413


ALIKE = [[0], [0, 0], [0, 2], [0, 3], [2, 3, 4], [0, 1, 2, 3, 4], [4, 4, 4, 1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("numbers", ALIKE, ids=str)
def test_kernels_of_a_batch_take_no_more_bytes_than_are_counted_and_are_gone_after_it(
    make_model, make_adapters, tokenizer, monkeypatch, numbers, dtype
):
    monkeypatch.setattr("loraweave.serving.memory.KEPT_BYTES", 0)
    model = make_model("llama", dtype=dtype)
    adapters = make_adapters(model, "llama")
    batch, experts = make_batch(model, tokenizer)
    heard = [
        Heard(tokenizer, PROMPTS[number], served(adapters, MIXTURES[number]), Sampling(4, temperature=0.0))
        for number in numbers
    ]
    seen = []
    model.register_forward_hook(lambda *_: seen.append(sum(plan.num_bytes for plan in made())))

    def made():
        return list(experts._engine._plans._plans.values())

    join(batch, experts, heard)
    finish(batch)
    most = Budgets(model, Limits(memory_bytes=1), KeptPrefixes(0), experts)._kernels([each.row for each in heard])
    # the prompts, and three steps of which each has kernels
    assert len(seen) >= 2
    assert min(seen) > 0
    assert max(seen) <= most
    for each in heard:
        experts.give_back(each.row.served)
    assert not made()
    assert experts._engine._plans._workspace.num_bytes == 0


def test_what_was_used_longest_ago_makes_room_first_whatever_it_is(setting, tokenizer, make_scheduler):
    engine, adapters = setting
    scheduler = make_scheduler(rows=1)

    def ask(weights, prompt):
        heard = Heard(tokenizer, prompt, served(adapters, weights), Sampling(3, temperature=0.0))
        scheduler.submit([heard.row])
        wait_for([heard])

    ask({"a": 1.0}, "abc")
    ask({}, "the judge thanked: zebra")
    ask({"b": 1.0}, "abc")
    scheduler.close()
    prefixes, experts = scheduler._prefixes, scheduler.experts
    by_content = {engine.pool[name].hash: name for name in "abc"}
    order = []
    while prefixes.kept_bytes + unused_bytes(experts):
        before = set(experts.loaded)
        limits = Limits(memory_bytes=prefixes.kept_bytes + unused_bytes(experts) - 1)
        Budgets(engine.model, limits, prefixes, experts).make_room([])
        gone = before.difference(experts.loaded)
        order.append(by_content[gone.pop()] if gone else "beginning")
    assert order == ["a", "beginning", "b"]


class Priced(StepTimes):
    """A step takes 1 s and a tenth for each rank row of its lines."""

    def predict(self, rows):
        return 1 + sum(adapter.rank for row in rows for adapter in row.served.adapters.values()) / 10


def test_rows_whose_ranks_cost_less_pass_one_that_would_slow_the_batch_a_few_times(setting, tokenizer):
    engine, adapters = setting
    ranks = {name: engine.pool[name].rank for name in "abc"}
    assert ranks == {"a": 1, "b": 4, "c": 3}
    limits = Limits(rows=3, token_seconds=1.45)
    admission = partial(Budgets, step_times=Priced(8, "cpu"))
    scheduler = Scheduler(engine.model, tokenizer, limits, Metrics(), admission)
    begun = []

    def row(name, number):
        def tell(piece):
            if (name, number) not in begun:
                begun.append((name, number))

        # they end one after the other, so that the batch is never empty
        length = Sampling(4 + (number + (name == "a")) % 3, temperature=0.0)
        return Row([tokenizer("abc")["input_ids"]], served(adapters, {name: 1.0}), length, tell)

    rows = [row("c", 0), row("b", 0), *(row("a", number) for number in range(20))]
    # as `submit` does, before there is a thread
    scheduler._waiting.extend(rows)
    scheduler.turn()
    # ranks 3 + 4 would take 1.7 s, 3 + 1 take 1.4, 4 + 1 are never in time
    assert begun == [("c", 0), ("a", 0)]
    while not all(each.over for each in rows):
        scheduler.turn()
    place = begun.index(("b", 0))
    assert place == 1 + MOST_PASSED
    assert [each for each in begun if each[0] == "a"] == [("a", number) for number in range(20)]


def test_a_row_that_is_never_in_time_runs_alone(setting, tokenizer, make_scheduler):
    heard = heard_rows(tokenizer, setting[1])
    scheduler = make_scheduler(rows=5, token_seconds=1e-9)
    scheduler.submit([each.row for each in heard])
    wait_for(heard)
    require_alone(setting[0], heard)


def test_a_step_is_predicted_by_the_number_of_rows_and_by_what_their_ranks_are_priced_at(setting, tokenizer):
    times = StepTimes(4, "cpu")
    rows = [each.row for each in heard_rows(tokenizer, setting[1])]
    assert times.predict(rows) == 0
    price = times._updates
    sets = [rows[:count] for count in (1, 2, 3, 4, 5)] + [rows[3:], rows[2:4], rows[1:2]]
    for each in sets:
        times.saw(each, 0.02 + 0.003 * len(each) + 5 * price(each))
    for each in (rows[2:], rows[:3], rows[1:2]):
        assert times.predict(each) == pytest.approx(0.02 + 0.003 * len(each) + 5 * price(each), rel=0.2)
    assert times.predict(rows[2:3]) > times.predict(rows[1:2])
