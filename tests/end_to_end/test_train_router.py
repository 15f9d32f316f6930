"""The script that trains a router over the shipped pool, in a small form."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import loraweave as lw

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
def test_a_few_steps_on_two_tasks_lower_the_loss_of_rows_held_out(tmp_path):
    command = [
        sys.executable,
        str(EXAMPLES / "train_router.py"),
        "--tasks",
        "plural",
        "past_tense",
        "--out",
        str(tmp_path / "routed"),
    ]
    command += ["--rows", "8", "--held-out", "2", "--steps", "4", "--batch-size", "2", "--threads", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.splitlines()[0].startswith("base")
    router = lw.router(tmp_path / "routed")
    (_, first), *rest = router.training_report.evaluations
    assert min(loss for _, loss in rest) < first
    assert router.pool.names == ("past_tense", "plural")
    assert (tmp_path / "routed" / "curve.png").is_file()
