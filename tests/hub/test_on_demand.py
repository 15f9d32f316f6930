from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import tiny_hubs
import torch

from loraweave.errors import AdapterNotFound, AdapterQuarantined, AdapterUnsupported, UnknownExpert, WeightingError
from loraweave.hub.hub import Hub
from loraweave.hub.pool import NUM_KEPT, ExpertPool, OnDemand

NAMES = [f"e{number:03d}" for number in range(100)]


def adapter(name, seed=0):
    return tiny_hubs.adapter(seed, name, layers=["q"])


class Shelf:
    """An opener that counts."""

    def __init__(self):
        self.opened = []

    def __call__(self, name):
        self.opened.append(name)
        return adapter(name)


def test_a_lazy_pool_answers_for_its_names_without_opening_an_adapter():
    shelf = Shelf()
    pool = ExpertPool.on_demand(NAMES, shelf)
    assert (pool.names, len(pool), list(pool)) == (tuple(NAMES), 100, NAMES)
    assert "e007" in pool.adapters
    assert "x" not in pool.adapters
    assert pool.subset(NAMES[:50]).without("e003").including("more", adapter("more")).lazy
    assert (pool.lazy, shelf.opened) == (True, [])


def test_an_adapter_is_opened_once_while_it_is_held_or_was_asked_for_lately():
    shelf = Shelf()
    pool = ExpertPool.on_demand(NAMES, shelf)
    held = pool["e000"]
    for name in NAMES[: NUM_KEPT + 20]:
        pool[name]
    assert pool["e000"] is held
    assert len(shelf.opened) == NUM_KEPT + 20


def test_no_more_than_those_asked_for_last_stay_open():
    shelf = Shelf()
    adapters = OnDemand(NAMES, shelf, num_kept=3)
    for name in NAMES:
        adapters[name]
    gc.collect()
    assert adapters.num_open == 3
    adapters["e097"], adapters["e000"], adapters["e097"]
    assert shelf.opened == [*NAMES, "e000"]


def test_a_lazy_pool_shows_how_many_it_has_and_how_many_are_open():
    pool = ExpertPool.on_demand([f"{number}" for number in range(2000)], Shelf())
    held = pool["7"]
    assert repr(pool) == "ExpertPool(adapters=OnDemand(2,000 adapters, 1 open))"
    assert held.name == "7"


def test_pools_made_of_a_lazy_one_share_what_is_open():
    shelf = Shelf()
    pool = ExpertPool.on_demand(NAMES, shelf)
    assert pool.subset(["e002", "e001"])["e001"] is pool["e001"]
    assert pool.without("e002")["e001"] is pool["e001"]
    assert shelf.opened == ["e001"]


def test_an_adapter_in_memory_is_an_expert_of_a_lazy_pool_too_and_replaces_one_of_its_name():
    pool = ExpertPool.on_demand(NAMES, Shelf())
    mine = adapter("mine", seed=1)
    more = pool.including("mine", mine).including("e001", mine)
    assert (more["mine"], more["e001"], more.names) == (mine, mine, (*NAMES, "mine"))
    assert pool["e001"] is not mine


def test_a_thousand_changes_of_a_lazy_pool_leave_nothing_behind():
    shelf = Shelf()
    pool = ExpertPool.on_demand(NAMES, shelf)
    seen = weakref.WeakSet()
    for number in range(1000):
        more = adapter(f"more{number}")
        seen.add(more)
        pool = pool.including(more.name, more).without(more.name)
    del more
    gc.collect()
    assert pool.names == tuple(NAMES)
    assert len(seen) == 0


def test_an_unknown_repeated_or_missing_name_is_refused_by_a_lazy_pool_as_by_another():
    pool = ExpertPool.on_demand(["a", "b"], Shelf())
    for ask in (pool.__getitem__, pool.without, lambda name: pool.subset([name])):
        with pytest.raises(UnknownExpert, match="no expert 'x' in the pool; it has 'a', 'b'"):
            ask("x")
    with pytest.raises(WeightingError, match="several adapters named 'b'"):
        ExpertPool.on_demand(["a", "b", "b"], Shelf())
    with pytest.raises(WeightingError, match="the pool is empty"):
        ExpertPool.on_demand([], Shelf())
    with pytest.raises(WeightingError, match="the pool is empty"):
        pool.subset(["a"]).without("a")


def test_threads_that_ask_at_once_get_one_object():
    barrier, found = threading.Barrier(4), []

    def slowly(name):
        barrier.wait()
        return adapter(name)

    adapters = OnDemand(["a"], slowly)
    threads = [threading.Thread(target=lambda: found.append(adapters["a"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(one) for one in found}) == 1


@pytest.fixture
def hub(tmp_path):
    hub = Hub(tmp_path / "hub")
    for number, name in enumerate("abc"):
        hub.add(adapter(name, seed=number), anomalies="off")
    return hub


def test_a_lazy_pool_of_a_hub_has_the_same_experts_as_one_that_is_not(hub):
    pool, expected = hub.pool(lazy=True), hub.pool()
    assert (pool.lazy, expected.lazy) == (True, False)
    assert [pool[name].hash for name in pool] == [expected[name].hash for name in expected]
    assert hub.pool(["c", "a"], lazy=True).names == ("c", "a")
    assert torch.equal(pool.stacked("q").a_SI, expected.stacked("q").a_SI)
    assert pool.layer_names == ("q",)


def test_an_unknown_name_is_refused_when_the_lazy_pool_is_made(hub):
    with pytest.raises(AdapterNotFound, match="no adapter 'x'"):
        hub.pool(["a", "x"], lazy=True)
    with pytest.raises(WeightingError, match="several adapters named 'a'"):
        hub.pool(["a", "a"], lazy=True)


def test_an_expert_of_a_lazy_pool_stays_the_version_that_it_was(hub):
    pool, before = hub.pool(lazy=True), hub["b"].hash
    hub.add(adapter("b", seed=9), replace=True, anomalies="off")
    assert pool["b"].hash == before != hub["b"].hash


def test_an_expert_that_is_gone_or_another_by_the_time_it_is_opened_is_named(hub):
    pool = hub.pool(lazy=True)
    hub.remove("a")
    hub.remove("b")
    hub.add(adapter("b", seed=9), anomalies="off")
    hub.quarantine("c")
    with pytest.raises(AdapterNotFound, match="no adapter 'a'"):
        pool["a"]
    with pytest.raises(AdapterNotFound, match=r"version 1 of adapter 'b' had the hash .* make the pool again"):
        pool["b"]
    with pytest.raises(AdapterQuarantined):
        pool["c"]


def test_a_lazy_pool_is_copied_and_refuses_a_pickle_with_the_way_out():
    pool = ExpertPool.on_demand(NAMES, Shelf())
    assert copy.deepcopy(pool).names == pool.names
    with pytest.raises(AdapterUnsupported, match=r"lazy pool has no pickle.*Hub\(path\)\.pool\(names, lazy=True\)"):
        pickle.dumps(pool)
    some = ExpertPool(dict(pool.subset(NAMES[:2]).adapters))
    assert pickle.loads(pickle.dumps(some)).names == tuple(NAMES[:2])
