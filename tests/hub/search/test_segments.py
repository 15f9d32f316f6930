from __future__ import annotations

import numpy as np
import pytest

from loraweave import registry
from loraweave.hub.search import keys as keys_module
from loraweave.hub.search.keys import Keys

DIM = 6


def flat(count):
    return registry.get("indexes", "flat")


def unit_rows(seed, count):
    rows = np.random.default_rng(seed).normal(size=(count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def by_hand(truth, query, k):
    """Python's sort over (-score, seq)."""
    scores = {seq: round(sum(float(a) * float(b) for a, b in zip(query, key, strict=True)), 6) for seq, key in truth.items()}
    return sorted(scores, key=lambda seq: (-scores[seq], seq))[:k]


def seqs_of(keys, query, k, **options):
    return [found.seqs_K.tolist() for found in keys.search(query, k, **options)]


@pytest.mark.parametrize("seed", range(4))
def test_after_any_changes_a_search_gives_what_a_sort_of_all_keys_gives(seed, monkeypatch):
    monkeypatch.setattr(keys_module, "MAX_LATE", 25)
    rng = np.random.default_rng(seed)
    keys, truth, following = Keys(DIM, flat), {}, 1
    for step in range(60):
        gone = rng.choice(sorted(truth) or [0], size=min(len(truth), int(rng.integers(3))), replace=False)
        moved = rng.choice(sorted(truth) or [0], size=min(len(truth), int(rng.integers(3))), replace=False)
        added = np.arange(following, following + int(rng.integers(6)))
        following += len(added)
        new = np.union1d(np.setdiff1d(moved, gone), added)
        # a few directions, so that scores tie
        vectors = unit_rows(7, 9)[rng.integers(9, size=len(new))]
        keys = keys.changed(gone, new, vectors)
        truth = {seq: key for seq, key in truth.items() if seq not in gone} | dict(zip(new.tolist(), vectors, strict=True))
        assert len(keys) == len(truth)
        if step % 6 == 0 and truth:
            query = unit_rows(step, 2)
            for k in (1, 5, 99):
                assert seqs_of(keys, query, k) == [by_hand(truth, one, k) for one in query]
            allowed = np.array(sorted(truth)[:: int(rng.integers(1, 4))])
            some = {seq: truth[seq] for seq in allowed.tolist()}
            assert seqs_of(keys, query, 4, allowed_seqs=allowed) == [by_hand(some, one, 4) for one in query]


def test_a_key_found_is_the_one_that_was_given():
    vectors = unit_rows(0, 5)
    keys = (
        Keys(DIM, flat).changed(np.empty(0, int), np.arange(5), vectors).changed(np.array([2]), np.array([7]), -vectors[:1])
    )
    (found,) = keys.search(vectors[:1], 9)
    for seq, key in zip(found.seqs_K.tolist(), found.keys_KD, strict=True):
        np.testing.assert_array_equal(key, -vectors[0] if seq == 7 else vectors[seq])


def test_no_keys_and_keys_that_are_all_gone_find_nothing():
    query = unit_rows(1, 3)
    empty = Keys(DIM, flat)
    gone = empty.changed(np.empty(0, int), np.arange(4), unit_rows(0, 4)).changed(np.arange(4), np.empty(0, int), query[:0])
    for keys in (empty, gone):
        assert len(keys) == 0
        assert seqs_of(keys, query, 3) == [[], [], []]


def test_single_additions_leave_few_segments_and_the_large_one_untouched():
    keys = Keys(DIM, flat).changed(np.empty(0, int), np.arange(900), unit_rows(0, 900))
    first = keys.segments[0]
    for seq in range(900, 1500):
        keys = keys.changed(np.empty(0, int), np.array([seq]), unit_rows(seq, 1))
        assert len(keys.segments) <= 12
        assert keys.segments[0] is first


def test_when_the_late_ones_are_many_all_become_one_segment_again():
    keys = Keys(DIM, flat).changed(np.empty(0, int), np.arange(900), unit_rows(0, 900))
    keys = keys.changed(np.arange(10), np.arange(900, 2000), unit_rows(1, 1100))
    (only,) = keys.segments
    assert only.seqs_N.tolist() == list(range(10, 2000))
    assert only.alive_N is None
