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
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    one = script.trained(gradient_accumulation=2)
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    losses, evaluations = ast.literal_eval((tmp_path / "0.txt").read_text())
    assert losses == pytest.approx(one.training_report.losses, rel=1e-4)
    for (step, loss), (same, expected) in zip(evaluations, one.training_report.evaluations, strict=True):
        assert (step, loss) == (same, pytest.approx(expected, rel=1e-4))
    for name, value in one.expert_state().items():
        assert torch.equal(found[0][name], found[1][name])
        # transformers takes logits in fp32 to their loss, and AdamW divides small gradients by themselves
        torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-5)
