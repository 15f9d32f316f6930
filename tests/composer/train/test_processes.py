"""Several processes train as one does."""

import ast
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
def test_two_processes_train_as_one_with_two_passes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=150) for process in processes] == [0, 0]
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    one = script.trained(gradient_accumulation=2), script.routed(gradient_accumulation=2), script.adapted()
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    sharded = [load_file(tmp_path / f"{rank}.sharded.safetensors") for rank in range(2)]
    told, refused = ast.literal_eval((tmp_path / "0.txt").read_text())
    for (losses, evaluations), (expected, at) in zip(told, script.reports(*one), strict=True):
        assert losses == pytest.approx(expected, rel=1e-4)
        assert [step for step, _ in evaluations] == [step for step, _ in at]
        assert [loss for _, loss in evaluations] == pytest.approx([loss for _, loss in at], rel=1e-4)
    for name, value in script.values(*one).items():
        assert torch.equal(found[0][name], found[1][name])
        # transformers takes logits in fp32 to their loss, and AdamW divides small gradients by themselves
        torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-5)
        # of a base that FSDP's fully_shard has put apart
        assert torch.equal(sharded[0][name], sharded[1][name])
        torch.testing.assert_close(sharded[0][name], value, rtol=1e-3, atol=1e-5)
    assert "steps of 3 rows, which do not divide among 2 launched processes" in refused[0]
    assert "2 processes were launched, which share the rows of each step, and n_jobs is for one" in refused[1]
    assert "the 2 launched processes do not train the same jobs" in refused[2]
    # what the first has kept, one process goes on from
    again = script.adapted(checkpoint=tmp_path / "kept")
    assert all(
        torch.equal(value, found[0][name]) for name, value in script.values(*one[:2], again).items() if " model." in name
    )
