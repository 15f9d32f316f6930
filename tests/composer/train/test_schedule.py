"""Which jobs share a batch, against every way to share it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from loraweave.composer.train.shared import groups, successor
from loraweave.composer.train.state import JobSize


def sizes_of(widths, rows=2):
    return {f"job{index}": JobSize(rows, width, int(width), 1, 10) for index, width in enumerate(widths)}


def always(_):
    return True


def every_partition(names):
    if not names:
        yield []
        return
    for end in range(1, len(names) + 1):
        for rest in every_partition(names[end:]):
            yield [names[:end], *rest]


@pytest.mark.parametrize("seed", range(6))
def test_groups_are_as_few_as_can_be_and_compute_the_fewest_tokens_of_those(seed):
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(3, 40, (7,), generator=generator).tolist()
    sizes = sizes_of(widths)

    def tokens(found):
        return sum(2 * len(group) * max(sizes[name].width for name in group) for group in found)

    found = groups(sizes, 3, always)
    by_width = sorted(sizes, key=lambda name: sizes[name].width)
    best = min((len(way), tokens(way)) for way in every_partition(by_width) if max(len(group) for group in way) <= 3)
    assert (len(found), tokens(found)) == best
    assert sorted(name for group in found for name in group) == sorted(sizes)


def test_one_short_job_does_not_wait_for_long_ones():
    assert groups(sizes_of([30, 2, 30, 30, 30]), 4, always) == [["job1"], ["job0", "job2", "job3", "job4"]]


def test_a_group_that_does_not_fit_into_memory_is_shared_out():
    def fits(members):
        return sum(size.num_rows for size in members) * max(size.longest for size in members) <= 60

    found = groups(sizes_of([10, 13, 14, 30]), 4, fits)
    # 2 rows each: three jobs would be 84 tokens, two are at most 56
    assert found == [["job0"], ["job1", "job2"], ["job3"]]


def test_jobs_of_equal_length_keep_their_order():
    assert groups(sizes_of([5, 5, 5]), 2, always) == [["job0"], ["job1", "job2"]]


def test_the_successor_is_the_nearest_in_length_that_fits():
    waiting = sizes_of([4, 11, 30])
    running = list(sizes_of([12, 14]).values())
    assert successor(waiting, running, always) == "job1"
    assert successor(waiting, running, lambda members: members[-1].longest < 10) == "job0"
    assert successor(waiting, running, lambda _: False) is None


def test_groups_follow_each_other_from_short_to_long():
    found = groups(sizes_of([9, 1, 8, 2, 7]), 2, always)
    sizes = sizes_of([9, 1, 8, 2, 7])
    ends = [sizes[name].width for group in found for name in group]
    assert all(left <= right for left, right in pairwise(ends))
