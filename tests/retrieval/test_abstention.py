from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from loraweave.errors import RetrievalError
from loraweave.retrieval.abstention import Abstention


def test_the_threshold_is_the_lowest_that_lets_no_more_than_the_share_through():
    foreign = [n / 100 for n in range(100)]
    found = Abstention.calibrated([0.2, 0.96, 0.97, 0.98], foreign, false_accept=0.05)
    # .95 to .99 are five of a hundred; .94 must not pass
    assert found.threshold == pytest.approx(0.940001)
    assert (found.false_accept, found.accept) == (0.05, 0.75)
    assert (found.num_own, found.num_foreign) == (4, 100)


def test_equals_at_the_threshold_stay_out():
    found = Abstention.calibrated([0.5, 0.6], [0.5] * 10, false_accept=0.2)
    assert (found.false_accept, found.accept) == (0.0, 0.5)


@pytest.mark.parametrize(("share", "count", "high"), [(0.0, 10, 0.2775), (0.05, 100, 0.1118)])
def test_the_upper_end_is_wilsons(share, count, high):
    foreign = [1.0 if n < share * count else 0.0 for n in range(count)]
    assert Abstention.calibrated([1.0], foreign, false_accept=share).false_accept_high == pytest.approx(high, abs=5e-4)


def test_a_threshold_from_one_half_holds_for_the_other():
    rng = np.random.default_rng(0)
    foreign = np.clip(rng.normal(0.3, 0.1, 2000), -1, 1).tolist()
    found = Abstention.calibrated([0.9], foreign[:1000], false_accept=0.05)
    assert np.mean(np.array(foreign[1000:]) >= found.threshold) == pytest.approx(0.05, abs=0.03)


def test_what_is_saved_is_read_back(tmp_path):
    found = Abstention.calibrated([0.9], [0.1, 0.2], false_accept=0.0, search="hashing", inputs_per_query=5)
    found.save(tmp_path / "threshold.json")
    assert Abstention.load(tmp_path / "threshold.json") == found


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"threshold": 0.5}'])
def test_a_file_that_is_no_threshold_is_refused(tmp_path, text):
    (tmp_path / "threshold.json").write_text(text)
    with pytest.raises(RetrievalError, match="no calibrated threshold"):
        Abstention.load(tmp_path / "threshold.json")


def test_a_threshold_that_is_not_finite_is_refused(tmp_path):
    found = Abstention.calibrated([0.9], [0.1], false_accept=0.0)
    dataclasses.replace(found, threshold=float("nan")).save(tmp_path / "threshold.json")
    with pytest.raises(RetrievalError, match="threshold nan"):
        Abstention.load(tmp_path / "threshold.json")


@pytest.mark.parametrize(
    ("own", "foreign", "share", "message"),
    [([], [0.1], 0.05, "0 of own"), ([0.1], [], 0.05, "0 of foreign"), ([0.1], [0.1], 1.0, "false_accept is 1.0")],
)
def test_what_cannot_be_calibrated_is_refused(own, foreign, share, message):
    with pytest.raises(RetrievalError, match=message):
        Abstention.calibrated(own, foreign, false_accept=share)
