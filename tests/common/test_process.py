from __future__ import annotations

import gc
import threading

import pytest
import scipy.linalg  # noqa: F401  its BLAS must be loaded to be counted
import torch
from threadpoolctl import ThreadpoolController

from loraweave.common.process import one_blas_thread, paused_collector, side_by_side


def failing(seen):
    with paused_collector():
        seen.append(gc.isenabled())
        raise RuntimeError


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_off_in_the_block_and_afterwards_what_it_was(on):
    (gc.enable if on else gc.disable)()
    seen = []
    try:
        with pytest.raises(RuntimeError):
            failing(seen)
        assert (seen, gc.isenabled()) == ([False], on)
    finally:
        gc.enable()


def blas_threads():
    return [library["num_threads"] for library in ThreadpoolController().select(user_api="blas").info()]


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


def test_results_come_in_the_order_of_the_items(threads):
    assert list(side_by_side(lambda item: item**2, range(20))) == [item**2 for item in range(20)]


def test_results_come_in_order_when_only_some_items_are_worth_a_thread(threads):
    found = side_by_side(lambda item: (item, threading.get_ident()), range(9), worth=lambda item: item % 2 == 0)
    assert [item for item, _ in found] == list(range(9))


def test_an_item_that_is_not_worth_a_thread_is_done_by_the_caller(threads):
    found = list(side_by_side(lambda item: threading.get_ident(), range(3), worth=lambda item: False))
    assert found == [threading.get_ident()] * 3


def test_an_error_comes_to_the_caller_where_the_result_would(threads):
    def fail(item):
        if item == 2:
            raise ValueError("two")
        return item

    results = side_by_side(fail, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_few_items_exist_at_a_time(threads):
    made, most = 0, 0

    def items():
        nonlocal made
        for item in range(30):
            made += 1
            yield item

    for done, _ in enumerate(side_by_side(lambda item: item, items())):
        most = max(most, made - done)
    assert most <= threads + 2


def test_blas_has_one_thread_inside_and_its_own_number_after(threads):
    before = blas_threads()
    with one_blas_thread() as outer:
        with one_blas_thread() as inner:
            pass
        assert set(blas_threads()) == {1}
    assert blas_threads() == before
    assert (outer, inner) == (max(before), 1)
    assert set(side_by_side(lambda item: tuple(set(blas_threads())), range(3))) == {(1,)}
    assert blas_threads() == before


def test_an_error_gives_blas_its_threads_back(threads):
    before = blas_threads()
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda item: 1 // item, range(3)))
    assert blas_threads() == before
