"""Paging by threads, in forked processes and in any order: each expert is brought once, and the budgets hold."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from paged_adapters import ADAPTERS, CPU, FP32, LAYERS, NAMES, PLACES, assert_the_adapters_own, everything, size_of

from loraweave.composer.live.residents import Residents
from loraweave.errors import BudgetExceeded


def succeeds_in_a_fork(call):
    child = os.fork()
    if not child:
        signal.alarm(120)
        try:
            call()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_the_thread_that_it_does_not_have():
    residents = Residents(ADAPTERS.__getitem__, lambda: PLACES)
    residents.prefetch(["e1"]).result(timeout=60)

    def there():
        residents.settle()
        residents.prefetch(["e2"]).result(timeout=60)

    assert succeeds_in_a_fork(there)
    residents.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_process_forked_while_an_expert_is_on_its_way_brings_it_itself():
    begun, go = threading.Event(), threading.Event()
    here = os.getpid()

    def opener(name):
        if os.getpid() == here and begun.is_set():
            go.wait(timeout=120)
        begun.set()
        return ADAPTERS[name]

    residents = Residents(opener, lambda: PLACES, staged=everything)
    coming = residents.prefetch(["e1"])
    begun.wait(timeout=60)
    # the second opening, for the page itself, holds the locks on its way
    while not residents.in_use("e1"):
        time.sleep(0.001)
    assert succeeds_in_a_fork(lambda: assert_the_adapters_own(residents.lease(["e1", "e2"]), "e1"))
    go.set()
    coming.result(timeout=60)
    residents.close()


def test_layers_that_become_known_while_others_lease_move_nothing():
    places = {}

    def opener(name):
        places.update(dict.fromkeys(ADAPTERS[name].layers, FP32))
        return ADAPTERS[name]

    residents = Residents(opener, lambda: dict(places))

    def work(number):
        for turn in range(16):
            lease = residents.lease([NAMES[(number * 2 + turn) % 8]])
            assert_the_adapters_own(lease, *lease.names)
            lease.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert residents.residency.bytes_from_disk == sum(map(size_of, NAMES))


def test_threads_that_lease_the_same_experts_at_once_bring_each_once():
    residents = Residents(ADAPTERS.__getitem__, lambda: PLACES, staged=everything)
    barrier = threading.Barrier(4)

    def work(number):
        barrier.wait()
        for turn in range(20):
            names = [NAMES[(number + turn) % 8], NAMES[(turn * 3) % 8]]
            lease = residents.lease(names)
            for name in names:
                assert_the_adapters_own(lease, name)
            lease.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert residents.residency.bytes_to_device == sum(map(size_of, NAMES))


class Paging(RuleBasedStateMachine):
    """Leases, releases, prefetches and moves in any order, on budgets that hold about three experts."""

    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.places = dict(PLACES)
        self.budget = 3 * max(map(size_of, NAMES))
        self.residents = Residents(
            ADAPTERS.__getitem__,
            lambda: self.places,
            staged=everything,
            device_budget_bytes=self.budget,
            host_budget_bytes=2 * max(map(size_of, NAMES)),
        )
        self.open = []

    @rule(target=leases, names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    def lease(self, names):
        try:
            lease = self.residents.lease(names)
        except BudgetExceeded:
            used = {name for other, _ in self.open for name in other.names} | set(names)
            # a model that has moved has an expert of an older lease twice
            copies = len({lease.moves for lease, _ in self.open}) + 1
            assert copies * sum(map(size_of, used)) > self.budget
            return None
        self.open.append((lease, dict(self.places)))
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease):
        if lease is not None:
            self.open = [pair for pair in self.open if pair[0] is not lease]
            lease.release()
            lease.release()

    @rule(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True))
    def prefetch(self, names):
        error = self.residents.prefetch(names).exception(timeout=60)
        assert error is None or isinstance(error, BudgetExceeded)

    @rule(dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def move(self, dtype):
        self.places = dict.fromkeys(LAYERS, (CPU, dtype))

    @rule()
    def forget(self):
        self.residents.forget()

    @invariant()
    def within_budget(self):
        figures = self.residents.residency
        assert figures.device_bytes <= self.budget
        assert figures.host_bytes <= 2 * max(map(size_of, NAMES))

    @invariant()
    def leased_experts_are_on_their_shelf(self):
        for lease, _ in self.open:
            shelf = self.residents._device
            assert [key for key in lease.on_device if key not in shelf or key in shelf._idle] == []
            assert {key.name for key in lease.on_device} == set(lease.names)

    @invariant()
    def leased_experts_are_the_adapters_own(self):
        for lease, places in self.open:
            for name in lease.names:
                assert_the_adapters_own(lease, name, places["q"])

    def teardown(self):
        leases, self.open = [lease for lease, _ in self.open], []
        for lease in leases:
            lease.release()
        self.residents.close()
        figures = self.residents.residency
        assert (figures.device_bytes, figures.host_bytes) == (0, 0)


Paging.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


TestPaging = Paging.TestCase
