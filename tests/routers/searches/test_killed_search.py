"""A search whose process is killed, in the middle of anything, goes on from its checkpoint to the same result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from loraweave.routers.searches.lorahub import Lorahub

NAMES = ("a", "b", "c")
# each evaluation takes its time, so that the kill falls on one of them
SEARCH = """
import sys, time
from loraweave.routers.searches.lorahub import Lorahub

def slow(candidates):
    print("evaluating", flush=True)
    time.sleep(0.05)
    return [float(((candidate.values_BTLE - 0.4) ** 2).sum()) for candidate in candidates]

Lorahub(("a", "b", "c"), budget=2000, seed=3, restarts=0, tolerance=0.0).solve(slow, checkpoint=sys.argv[1])
"""


def bowl(candidates):
    return [float(((candidate.values_BTLE - 0.4) ** 2).sum()) for candidate in candidates]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_search_resumes_bit_for_bit(tmp_path):
    log = tmp_path / "search.json"
    process = subprocess.Popen([sys.executable, "-c", SEARCH, str(log)], stdout=subprocess.PIPE, text=True)
    for _ in range(6):
        assert process.stdout.readline() == "evaluating\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = json.loads(log.read_text())
    # the start and four or five generations
    assert 1 + 4 * 8 <= len(kept["losses"]) <= 1 + 5 * 8
    options = {"budget": 2000, "seed": 3, "restarts": 0, "tolerance": 0.0}
    evaluated = []
    resumed = Lorahub(NAMES, **options).solve(lambda found: evaluated.extend(found) or bowl(found), checkpoint=log)
    whole = Lorahub(NAMES, **options).solve(bowl)
    assert resumed == whole
    assert resumed.mixture.values_BTLE.tolist() == whole.mixture.values_BTLE.tolist()
    assert len(evaluated) == len(whole.losses) - len(kept["losses"])
