"""Mutated adapter folders end in loraweave's own errors: no other exception, no hang, no memory, no file elsewhere."""

import pytest


def require_clean(found, num_cases):
    assert found["failures"] == []
    assert (found["cases"], found["problems"], found["left"]) == (num_cases, [], [])
    outcomes = found["outcomes"]
    assert sum(outcomes.values()) == num_cases
    # the mutations neither all miss nor all meet the first check
    assert outcomes["AdapterCorrupt"] > num_cases / 3
    assert min(outcomes["AdapterUnsupported"], outcomes["added"]) > num_cases / 100


def test_thousands_of_mutated_folders_are_taken_or_refused_by_name(short):
    require_clean(short("fuzz"), 2_500)


def test_a_folder_that_asks_for_more_than_it_holds_is_refused_within_twice_its_size(short):
    found = short("outsized")
    assert {name: wrong for name, (_, wrong) in found.items() if wrong} == {}
    assert len(found) == 6


@pytest.mark.faults_long
@pytest.mark.timeout(7200)
def test_a_hundred_thousand_mutated_folders_are_taken_or_refused_by_name(long):
    found = long("fuzz", 100_000, 5_000, timeout_s=7000)
    print(found["outcomes"], found["mutations"])
    require_clean(found, 100_000)


@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_every_folder_that_asks_for_more_than_it_holds_is_refused_within_twice_its_size(long):
    found = long("outsized", 1_000, timeout_s=3500)
    print(found)
    assert {name: wrong for name, (_, wrong) in found.items() if wrong} == {}
    assert len(found) > 20
