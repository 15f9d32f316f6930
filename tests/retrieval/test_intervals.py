"""Intervals of shares, beside scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from loraweave.retrieval.fusion import share_text, wilson


@pytest.mark.parametrize(("right", "count"), [(12, 12), (2, 2), (1, 1), (0, 1), (0, 50), (3, 7), (49, 50), (1, 2000)])
def test_the_interval_of_a_share_is_wilsons(right, count):
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), rel=1e-12, abs=1e-15)


def test_the_text_of_a_share_has_its_interval():
    assert [share_text(1.0, 12), share_text(0.6, 5), share_text(0.0, 3)] == ["100% (76-100)", "60% (23-88)", "0% (0-56)"]
    # of a report that was saved before the count was kept
    assert share_text(0.6, 0) == "60%"


def test_draws_count_as_many_answers_as_have_their_variance():
    # two points around the share, whose variance is 0.05 squared: that of 84 answers at a share of 0.3
    drawn_R = 0.3 + 0.05 * np.array([-1.0, 1.0] * 10)
    assert wilson(0.3, 40, drawn_R) == pytest.approx(wilson(0.3, 0.3 * 0.7 / 0.05**2), rel=1e-12)
    expected = binomtest(3, 10).proportion_ci(method="wilson")
    as_ten = 0.3 + (0.3 * 0.7 / 10) ** 0.5 * np.array([-1.0, 1.0] * 10)
    assert wilson(0.3, 40, as_ten) == pytest.approx((expected.low, expected.high), rel=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_draws_that_are_all_alike_leave_the_items_independent(share):
    assert wilson(share, 12, np.full(100, share)) == wilson(share, 12)
