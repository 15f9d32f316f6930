"""Attacks on a server's memory by compositions that are read, merged and loaded, counted in bytes."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from server_clients import Client, answering, gate_before, until

import loraweave as lw
from loraweave.extend.serving import Limits, Refusal, make_server
from loraweave.serving.names import Names, _merged

TIES = "ties(a, c; density=0.{})"


@pytest.fixture
def serve(tmp_path, make_model, make_adapters, tokenizer):
    """serve(limits...): the client of a server in float64 over a hub of the adapters a, b and c, with its `face`."""

    @contextmanager
    def run(**limits):
        model = make_model("llama", dtype=torch.float64)
        adapters = make_adapters(model, "llama")
        with lw.Hub(tmp_path / "hub") as hub:
            for adapter in adapters:
                hub.add(adapter, replace=True)
            server = make_server(hub, model, tokenizer, port=0, limits=Limits(**limits), log_level="critical")
            with answering(server) as port:
                client = Client(port, hub, lw.Composer(model, adapters, tokenizer=tokenizer))
                client.face = server.face
                yield client

    return run


def merged_bytes(hub):
    """The bytes of a merge of a and c: its factors in fp32, and the engine's copy in float64."""
    return (4 + 8) * lw.parse(TIES.format(5)).merge(hub, progress=False).num_values


def account(client):
    """The bytes of what is loaded, being made, kept, and read or copied by running rows."""
    scheduler = client.face.scheduler
    engine = scheduler.experts._engine
    copied = 0 if engine is None else sum(plan.num_bytes for plan in list(engine._plans._plans.values()))
    loaded = sum(each.size for each in scheduler.experts._loaded.values())
    states = scheduler._admission._states(scheduler._running)
    return loaded + copied + states + scheduler._admission.reserved + scheduler._prefixes.kept_bytes


@contextmanager
def uncollected():
    """A block in which Python's garbage collector does not run."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def failing_at_one(num_new):
    def fail(prompts, asked, *rest):
        if asked == 1:
            raise Refusal(400, "too few")
        return num_new(prompts, asked, *rest)

    return fail


def test_formulas_of_merges_stay_within_the_bytes_that_the_server_was_told(serve, monkeypatch):
    seen, own = [], Names.make

    def make(self, wanted):
        seen.append(account(client))
        return load(self, wanted)

    def load(*arguments):
        loaded.extend(map(weakref.ref, (made := own(*arguments)).all_adapters.values()))
        return made

    loaded = []
    monkeypatch.setattr(Names, "make", make)
    monkeypatch.setattr("loraweave.serving.memory.KEPT_BYTES", 0)
    with serve() as client:
        limit = 5 * merged_bytes(client.hub)
    with uncollected(), serve(memory_bytes=limit, waiting=64) as client, ThreadPoolExecutor(6) as pool:
        # every other one fails after its composition is loaded, so that no step of the model makes room
        client.face._prompts.num_new = failing_at_one(client.face._prompts.num_new)
        asked = [(TIES.format(300 + n), 2 if n % 2 else 1) for n in range(70)]
        statuses = list(pool.map(lambda each: client.complete(each[0], max_tokens=each[1])[0], asked))
        assert {*statuses[1::2]} <= {200, 429}
        assert {*statuses[::2]} == {400}
        assert statuses.count(200) > 20
        assert len(seen) >= 70
        assert max(seen) <= limit
        until(lambda: account(client) <= limit)
        # nor does anything else keep a merge, such as a circle of objects
        until(lambda: sum(adapter() is not None for adapter in loaded) <= 5)
        # what is used is not dropped, and what was used last is still there
        num_made = len(seen)
        assert client.complete(TIES.format(369), max_tokens=2)[0] == 200
        assert len(seen) == num_made


def test_what_does_not_fit_alone_is_refused_before_it_is_merged_with_both_figures(serve, monkeypatch):
    with serve() as client:
        needed = merged_bytes(client.hub)
    with serve(memory_bytes=needed // 2) as client:
        monkeypatch.setattr(Names, "make", None)
        status, _, body = client.complete(TIES.format(5), max_tokens=2)
        assert (status, body["error"]["code"]) == (413, "memory_exceeded")
        figures = [int(word) for word in body["error"]["message"].replace(";", "").split() if word.isdigit()]
        assert figures[0] >= needed
        assert figures[1] == needed // 2


def test_a_composition_in_use_is_kept_while_others_are_made_and_those_wait_for_its_memory(serve):
    with serve() as client:
        # of two merges with their kernels, and a little
        limit = int(2 * (1 + 8 / 12) * merged_bytes(client.hub)) + 2 * 160 * 256
    with serve(memory_bytes=limit) as client, ThreadPoolExecutor(4) as pool:
        running = pool.submit(client.complete, TIES.format(5), max_tokens=150)
        others = [pool.submit(client.complete, TIES.format(600 + n), max_tokens=3) for n in range(6)]
        assert {each.result()[0] for each in (running, *others)} == {200}
        client.engine.load("merged", lw.parse(TIES.format(5)).merge(client.hub, progress=False))
        expected = client.engine.generate(["abc"], mixture={"merged": 1.0}, max_new_tokens=150)[0]
        assert running.result()[2]["choices"][0]["text"] == expected


def test_the_figures_have_the_bytes_of_each_kind_and_how_many_merges_and_beginnings_there_are(serve):
    with serve() as client, gate_before(client.engine.model) as gate, ThreadPoolExecutor(1) as pool:
        kinds = ("expert", "merge", "prefix", "row", "making")
        assert [client.metric(f"{kind}_bytes") for kind in kinds] == [0] * 5
        asked = {"prompt": "the judge thanked the nurse", "max_tokens": 3}
        running = pool.submit(client.complete, TIES.format(5), **asked)
        assert gate.reached.wait(60)
        assert client.metric("merge_bytes") == merged_bytes(client.hub)
        gate.open()
        assert running.result()[0] == client.complete("b", **asked)[0] == 200
        until(lambda: client.metric("running_rows") == 0)
        assert client.metric("merge_bytes") == merged_bytes(client.hub)
        assert client.metric("expert_bytes") == (4 + 8) * client.hub["b"].num_values
        assert client.metric("prefix_bytes") == client.face.scheduler._prefixes.kept_bytes > 0
        assert [client.metric("row_bytes"), client.metric("making_bytes")] == [0, 0]
        assert [client.metric("merges"), client.metric("prefixes")] == [1, 2]


MERGES = [
    "ties(a, c; density=0.5)",
    "b + 0.5*ties(a, c; density=0.5)",
    "ties(a, c; density=0.5, rank=2)",
    "svd(a, b, c)",
    "task_arithmetic(a, b)",
    "0.7*svd(a, c) + 0.3*ties(b, c; density=0.9)",
]


@pytest.mark.parametrize("formula", MERGES)
def test_a_merge_has_no_more_values_than_were_counted_before(tmp_path, make_model, make_adapters, formula):
    adapters = make_adapters(make_model("llama"), "llama")
    merged = lw.parse(formula).merge(adapters, progress=False)
    _, most = _merged(lw.parse(formula).root, lw.ExpertPool(adapters))
    assert merged.num_values <= most
    if "+" not in formula and "svd" not in formula and "rank" not in formula:
        # and for these methods it is exact
        assert merged.num_values == most


def test_by_default_it_is_three_quarters_of_what_is_free(serve, monkeypatch):
    monkeypatch.setattr("loraweave.extensions.operations.admission.free_host_bytes", lambda: 4_000_000)
    with serve() as client:
        assert client.face.scheduler._admission.max_bytes == 3_000_000
