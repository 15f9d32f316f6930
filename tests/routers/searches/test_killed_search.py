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
# its sixth evaluation ends by the kill alone
SEARCH = """
import sys
from loraweave.routers.searches.lorahub import Lorahub

calls = []

def held(candidates):
    calls.append(candidates)
    if len(calls) == 6:
        print("held", flush=True)
        sys.stdin.read()
    return [float(((candidate.values_BTLE - 0.4) ** 2).sum()) for candidate in candidates]

Lorahub(("a", "b", "c"), budget=2000, seed=3, restarts=0, tolerance=0.0).solve(held, checkpoint=sys.argv[1])
"""


def bowl(candidates):
    return [float(((candidate.values_BTLE - 0.4) ** 2).sum()) for candidate in candidates]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_search_resumes_bit_for_bit(tmp_path):
    log = tmp_path / "search.json"
    command = [sys.executable, "-c", SEARCH, str(log)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = json.loads(log.read_text())
    # the start and four generations
    assert len(kept["losses"]) == 1 + 4 * 8
    options = {"budget": 2000, "seed": 3, "restarts": 0, "tolerance": 0.0}
    evaluated = []
    resumed = Lorahub(NAMES, **options).solve(lambda found: evaluated.extend(found) or bowl(found), checkpoint=log)
    whole = Lorahub(NAMES, **options).solve(bowl)
    assert resumed == whole
    assert resumed.mixture.values_BTLE.tolist() == whole.mixture.values_BTLE.tolist()
    assert len(evaluated) == len(whole.losses) - len(kept["losses"])
