"""Paging: what is leased is the adapter's own numbers, never goes, and never takes more than its budget."""

import gc
import inspect
import itertools
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from paged_adapters import ADAPTERS, CPU, FP32, LAYERS, NAMES, PLACES, adapter, assert_the_adapters_own, everything, size_of

from loraweave.composer.live.pages import ALIGNMENT_BYTES
from loraweave.composer.live.residents import Residents
from loraweave.errors import AdapterNotFound, BudgetExceeded, CompositionError


@pytest.mark.parametrize("staged", [None, everything])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_lease_has_the_adapters_numbers_in_the_layers_dtype(dtype, staged):
    options = {} if staged is None else {"staged": staged}
    residents = Residents(ADAPTERS.__getitem__, lambda: dict.fromkeys(LAYERS, (CPU, dtype)), **options)
    lease = residents.lease(NAMES)
    for name in NAMES:
        if dtype == torch.float64:
            for layer, factors in ADAPTERS[name].layers.items():
                part = lease.part(name, layer, CPU, dtype)
                assert torch.equal(part.b_RO, factors.b_OR.T.double())
        else:
            assert_the_adapters_own(lease, name, (CPU, dtype))


def test_each_layer_may_have_a_place_of_its_own():
    places = {"q": (CPU, torch.float32), "v": (CPU, torch.bfloat16), "down": (torch.device("meta"), torch.float16)}
    residents = Residents(ADAPTERS.__getitem__, lambda: places)
    lease = residents.lease(["e1", "e5"])
    for layer, place in places.items():
        part = lease.part("e5", layer, *place)
        assert (part.a_RI.device, part.a_RI.dtype) == place
        assert part.bias_O.dtype == torch.float32
    figures = residents.residency
    on_meta = sum(
        2 * sum(t.numel() for t in (f.a_RI, f.b_OR)) for n in ("e1", "e5") if (f := ADAPTERS[n].layers.get("down"))
    )
    on_meta += 4 * 2 * LAYERS["down"][0]
    assert figures.device_bytes == figures.bytes_to_device == on_meta
    assert (figures.num_on_device, figures.num_misses) == (2, 2)


def test_what_is_fp32_on_the_cpu_is_not_copied():
    lease = Residents(ADAPTERS.__getitem__, lambda: PLACES).lease(["e5"])
    part, factors = lease.part("e5", "down", *FP32), ADAPTERS["e5"].layers["down"]
    assert part.a_RI.data_ptr() == factors.a_RI.data_ptr()
    assert part.b_RO.data_ptr() == factors.b_OR.data_ptr()
    assert part.bias_O.data_ptr() == factors.bias_O.data_ptr()


def test_an_expert_on_a_device_is_one_allocation_there_and_one_copy():
    residents = Residents(ADAPTERS.__getitem__, lambda: PLACES, staged=everything)
    lease = residents.lease(["e1"])
    assert all(part.a_RI.is_contiguous() and part.b_RO.is_contiguous() for part in lease._parts["e1"].values())
    assert all(part.a_RI.data_ptr() % ALIGNMENT_BYTES == 0 for part in lease._parts["e1"].values())
    memory = {part.a_RI.untyped_storage().data_ptr() for part in lease._parts["e1"].values()}
    memory |= {part.b_RO.untyped_storage().data_ptr() for part in lease._parts["e1"].values()}
    assert len(memory) == 1


def test_an_expert_that_was_used_lately_is_not_opened_again():
    opened = []

    def opener(name):
        opened.append(name)
        return ADAPTERS[name]

    residents = Residents(opener, lambda: PLACES)
    for _ in range(3):
        residents.lease(["e1", "e2"]).release()
    assert set(opened) == {"e1", "e2"}
    assert len(opened) <= 4
    figures = residents.residency
    assert (figures.num_hits, figures.num_misses, figures.num_evictions) == (4, 2, 0)
    assert figures.host_bytes == figures.bytes_from_disk == size_of("e1") + size_of("e2")


@pytest.mark.parametrize("staged", [None, everything])
def test_a_budget_too_small_for_one_activation_is_refused_with_both_figures_before_anything_is_allocated(staged):
    sizes = [size_of(name) for name in NAMES]
    budget = sum(sizes) - 1
    option = "host_budget_bytes" if staged is None else "device_budget_bytes"
    options = {option: budget} if staged is None else {option: budget, "staged": staged}
    residents = Residents(ADAPTERS.__getitem__, lambda: PLACES, **options)
    residents.lease(NAMES[:2]).release()
    before = residents.residency
    with pytest.raises(
        BudgetExceeded, match=rf"the 8 experts of this activation need {sum(sizes):,} bytes, but {option} is {budget:,}; "
    ):
        residents.lease(NAMES)
    assert residents.residency == before
    residents.lease(NAMES[:7]).release()


def test_a_host_budget_without_room_for_one_expert_on_its_way_to_a_device_is_refused():
    residents = Residents(ADAPTERS.__getitem__, lambda: PLACES, staged=everything, host_budget_bytes=size_of("e1") - 1)
    with pytest.raises(BudgetExceeded, match=f"expert 'e1' need {size_of('e1')} bytes, but host_budget_bytes is"):
        residents.lease(["e1"])
    assert residents.residency.device_bytes == residents.residency.host_bytes == 0


def test_a_host_budget_of_one_expert_fills_a_device_with_many():
    budget = max(map(size_of, NAMES))
    residents = Residents(ADAPTERS.__getitem__, lambda: PLACES, staged=everything, host_budget_bytes=budget)
    lease = residents.lease(NAMES)
    for name in NAMES:
        assert_the_adapters_own(lease, name)
    assert residents.residency.num_on_device == 8
    assert residents.residency.host_bytes <= budget


def test_experts_of_other_leases_stay_and_are_named_where_there_is_no_room_beside_them():
    budget = size_of("e1") + size_of("e2")
    residents = Residents(ADAPTERS.__getitem__, lambda: PLACES, host_budget_bytes=budget)
    first = residents.lease(["e1", "e2"])
    with pytest.raises(BudgetExceeded, match=rf"beside the {budget:,} that open activations use, but host_budget_bytes"):
        residents.lease(["e3"])
    assert_the_adapters_own(first, "e1")
    first.release()
    assert_the_adapters_own(residents.lease(["e3"]), "e3")


def test_a_renewed_lease_holds_the_same_factors_after_the_first_has_ended_and_an_ended_one_is_not_renewed():
    residents = Residents(ADAPTERS.__getitem__, lambda: PLACES, host_budget_bytes=size_of("e5"))
    first = residents.lease(["e5"])
    second = first.renew()
    before = residents.residency
    first.release()
    with pytest.raises(CompositionError, match="this activation is closed"):
        first.renew()
    # nothing that stands for the name now takes the place of what the lease holds
    residents.forget()
    residents.take_from(lambda name: adapter(1), lambda: PLACES)
    assert_the_adapters_own(second, "e5")
    with pytest.raises(BudgetExceeded):
        residents.lease(["e1"])
    second.release()
    assert not residents.in_use("e5")
    assert residents.residency.num_hits == before.num_hits


def test_the_expert_used_longest_ago_goes_first():
    residents = Residents(lambda name: adapter(1), lambda: PLACES, host_budget_bytes=3 * size_of("e1"))
    for name in ("a", "b", "c", "a", "d"):
        residents.lease([name]).release()
    before = residents.residency
    residents.lease(["a", "c", "d"]).release()
    assert residents.residency.num_hits - before.num_hits == 3
    assert before.num_evictions == residents.residency.num_evictions == 1


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "1 GB"])
@pytest.mark.parametrize("option", ["device_budget_bytes", "host_budget_bytes"])
def test_a_budget_that_is_no_number_of_bytes_is_refused(option, budget):
    with pytest.raises(CompositionError, match=f"{option} is .*at least 1, or None"):
        Residents(ADAPTERS.__getitem__, lambda: PLACES, **{option: budget})


def test_a_model_that_moves_has_its_experts_in_the_new_place_and_lets_the_old_ones_go():
    places = dict(PLACES)
    residents = Residents(ADAPTERS.__getitem__, lambda: places)
    open_one = residents.lease(["e1"])
    residents.lease(["e2"]).release()
    places.update(dict.fromkeys(LAYERS, (CPU, torch.bfloat16)))
    # while it is open: layer by layer
    assert_the_adapters_own(open_one, "e1", (CPU, torch.bfloat16))
    lease = residents.lease(["e1", "e2"])
    assert_the_adapters_own(lease, "e2", (CPU, torch.bfloat16))
    open_one.release()
    assert residents.residency.host_bytes == sum(size_of(name, itemsize=2) for name in ("e1", "e2"))


def test_a_layer_whose_place_is_not_known_gets_its_factors_when_it_asks():
    residents = Residents(ADAPTERS.__getitem__, dict)
    lease = residents.lease(["e1", "e6"])
    assert_the_adapters_own(lease, "e6")
    assert_the_adapters_own(lease, "e6", (CPU, torch.bfloat16))
    assert residents.residency.host_bytes == 0


def test_factors_made_below_inference_mode_can_be_trained_through_later():
    residents = Residents(lambda name: adapter(1), lambda: PLACES)
    with torch.inference_mode():
        lease = residents.lease(["e1"])
    part = lease.part("e1", "q", *FP32)
    assert not part.a_RI.is_inference()
    assert not part.b_RO.is_inference()


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_adapter_that_cannot_be_opened_is_raised_and_leaves_no_lease(failing):
    calls = 0

    def opener(name):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise AdapterNotFound(f"no {name}")
        return ADAPTERS[name]

    residents = Residents(opener, lambda: PLACES)
    with pytest.raises(AdapterNotFound):
        residents.lease(["e1", "e2"])
    assert not residents.in_use("e1")
    lease = residents.lease(["e1", "e2"])
    assert_the_adapters_own(lease, "e2")
    lease.release()
    residents.forget()
    assert residents.residency.host_bytes == 0


def test_prefetched_experts_are_hits_and_an_error_is_the_futures_and_again_the_leases():
    opened = []

    def opener(name):
        opened.append(threading.current_thread().name)
        if name == "lost":
            raise AdapterNotFound("no adapter 'lost'")
        return ADAPTERS[name]

    residents = Residents(opener, lambda: PLACES)
    residents.prefetch(["e1", "e2"]).result(timeout=60)
    assert all(name.startswith("loraweave-prefetch") for name in opened)
    before = residents.residency
    lease = residents.lease(["e1", "e2"])
    assert_the_adapters_own(lease, "e2")
    assert (residents.residency.num_hits - before.num_hits, residents.residency.num_misses) == (2, 2)
    assert isinstance(residents.prefetch(["lost"]).exception(timeout=60), AdapterNotFound)
    with pytest.raises(AdapterNotFound, match="no adapter 'lost'"):
        residents.lease(["lost"])
    residents.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_filled_from_pinned_memory_within_its_budget():
    place = (torch.device("cuda", 0), torch.float32)
    budget = 3 * max(map(size_of, NAMES))
    residents = Residents(
        ADAPTERS.__getitem__, lambda: dict.fromkeys(LAYERS, place), device_budget_bytes=budget, host_budget_bytes=budget
    )
    for turn in range(20):
        name = NAMES[turn * 3 % 8]
        residents.prefetch([name]).result(timeout=60)
        lease = residents.lease([name])
        assert_the_adapters_own(lease, name, place)
        lease.release()
        assert residents.residency.device_bytes <= budget
    residents.close()


def test_forgotten_names_may_stand_for_other_adapters():
    named = {"x": ADAPTERS["e1"]}
    residents = Residents(named.__getitem__, lambda: PLACES)
    residents.lease(["x"]).release()
    residents.forget(lambda name: name == "x")
    assert residents.residency.host_bytes == 0
    named["x"] = ADAPTERS["e5"]
    part = residents.lease(["x"]).part("x", "down", *FP32)
    assert torch.equal(part.a_RI, ADAPTERS["e5"].layers["down"].a_RI)


def test_the_thousandth_expert_moves_the_bytes_that_the_first_did_and_memory_stays_flat():
    def opener(name):
        return adapter(1)

    residents = Residents(opener, lambda: PLACES, staged=everything, device_budget_bytes=20_000, host_budget_bytes=20_000)
    moved = []
    for number in range(1000):
        before = residents.residency
        residents.lease([f"x{number}"]).release()
        after = residents.residency
        moved.append((after.bytes_from_disk - before.bytes_from_disk, after.bytes_to_device - before.bytes_to_device))
    assert set(moved) == {(size_of("e1"), size_of("e1"))}
    residents.close()


def test_hundreds_of_cycles_of_loading_and_unloading_leave_memory_flat():
    residents = Residents(lambda name: adapter(1), lambda: PLACES, staged=everything)
    # not what threads of other tests allocate meanwhile
    paging = tracemalloc.Filter(True, f"{Path(inspect.getfile(Residents)).parent}/*")

    def cycles(number):
        for _ in range(number):
            residents.lease(["x"]).release()
            residents.forget()
        gc.collect()
        blocks = tracemalloc.take_snapshot().filter_traces([paging]).traces
        return sum(block.size for block in blocks), sum(type(each) is torch.Tensor for each in gc.get_objects())

    tracemalloc.start()
    try:
        sizes, tensors = zip(*(cycles(60) for _ in range(10)), strict=True)
    finally:
        tracemalloc.stop()
    # an object left behind in each cycle would be more in every sixty; tables that grow by and by are not
    assert min(later - earlier for earlier, later in itertools.pairwise(sizes)) < 60 * 50
    assert len(set(tensors)) == 1
    assert residents.residency.device_bytes == residents.residency.host_bytes == 0


def test_the_figures_print_as_a_small_table():
    residents = Residents(ADAPTERS.__getitem__, lambda: PLACES, host_budget_bytes=10_000)
    residents.lease(["e1"]).release()
    residents.lease(["e1"]).release()
    size = f"{size_of('e1'):,} B"
    assert str(residents.residency).splitlines() == [
        "hits       1 of 2 (50%), 0 evictions",
        f"moved      {size} disk to host, 0 B host to device",
        "on device  0 experts, 0 B (no limit)",
        f"on host    1 experts, {size} ({size_of('e1') / 10_000:.0%} of 9.8 KiB)",
    ]
