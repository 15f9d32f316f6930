"""The Triton kernels equal naive in Triton's interpreter, compile without a GPU, and equal it on one."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.composer.live.kernels._parts import Choice, Workload, choose
from loraweave.composer.live.row_weights import RankedRows, _LayerRows
from loraweave.extensions.accelerators.kernels.triton_gathered import TritonGathered
from loraweave.extensions.accelerators.kernels.triton_segments import TritonSegments
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments, **environment):
    """What a process of its own prints: whether Triton interprets is settled when it is imported."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    found = subprocess.run(command, env={**env, **environment}, capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@with_triton
def test_the_kernels_keep_their_rules_conform_like_every_other_and_serve_arenas_in_the_interpreter():
    # but for a case of rounding to bfloat16, which the interpreter cuts off
    chosen = "not (test_naive and not triton) and not (triton and applied_in_fp32)"
    files = HERE / "triton_cases.py", HERE / "arena_cases.py", TESTS / "composer/live/kernels/test_naive.py"
    printed = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files, TRITON_INTERPRET="1")
    assert " passed" in printed
    assert "skipped" not in printed


@with_triton
def test_the_kernels_compile_for_a_gpu_and_use_its_tensor_cores_in_half_precision(tmp_path):
    printed = run(HERE / "compile_triton.py", TRITON_CACHE_DIR=str(tmp_path))
    lines = [line.split() for line in printed.splitlines()]
    assert len(lines) == 12
    assert all(line[3] == "True" for line in lines)
    assert {(line[0], line[1]) for line in lines if line[2] == "mma"} == {
        (dtype, kernel) for dtype in ("bf16", "fp16") for kernel in ("shrink_group", "expand_group")
    }


@pytest.mark.gpu
@with_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_keep_their_rules_on_a_gpu():
    assert " passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "triton_cases.py")


def test_nothing_imports_triton_before_a_kernel_runs():
    code = (
        "import sys, torch; from loraweave.composer.composer import Composer; "
        "from loraweave.composer.live.kernels._parts import row_kernels; "
        "assert 'triton_segments' in row_kernels(); "
        "print('triton' in sys.modules)"
    )
    assert run("-c", code) == "False\n"


def test_triton_takes_rows_of_different_ranks_by_token_and_by_segment_where_it_runs(monkeypatch):
    on_gpu = Workload(32, 64, 312, 32, 312, 312, num_inputs=576, num_outputs=576, itemsize=2, device="cuda")
    wide = replace(on_gpu, num_inputs=4096, num_outputs=4096)
    installed = [True]
    monkeypatch.setattr("loraweave.extensions.accelerators.rank_tables._is_installed", lambda: installed[-1])
    choose.cache_clear()
    assert choose(wide).path == "triton_gathered"
    assert choose(replace(wide, tokens=128)).path == "triton_segments"
    # two calls of a library are less than two launches where that is all there is to do
    assert choose(replace(on_gpu, num_mixtures=2, largest=8, total=16, num_segments=2)).path == "gathered"
    installed.append(False)
    choose.cache_clear()
    assert not choose(wide).path.startswith("triton")
    choose.cache_clear()


@pytest.mark.parametrize("installed", [False, True])
def test_a_layer_on_a_gpu_is_offered_them_where_triton_is_installed(installed, monkeypatch):
    monkeypatch.setattr("loraweave.extensions.accelerators.rank_tables._is_installed", lambda: installed)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ranked = RankedRows.of(tuple(((number, 1.0),) for number in range(32)), (64, *31 * [8]))
    chosen = []
    choose.cache_clear()
    for device, dtype in (("cuda", torch.bfloat16), ("cuda", torch.float64), ("cpu", torch.bfloat16)):
        layer = _LayerRows(torch.device(device), dtype, ranked, None)
        chosen.append([choose(layer.workload(4096, 4096, tokens)).path for tokens in (1, 128)])
    choose.cache_clear()
    assert chosen[0] == ["triton_gathered", "triton_segments"] if installed else "triton" not in "".join(chosen[0])
    assert not any(path.startswith("triton") for path in chosen[1] + chosen[2])


@pytest.mark.parametrize("path", ["triton_gathered", "triton_segments"])
def test_what_was_chosen_is_what_a_layer_gets(path, monkeypatch):
    monkeypatch.setattr("loraweave.composer.live.row_weights.choose", lambda workload: Choice(path))
    found = []
    for kernel in (TritonGathered, TritonSegments):
        monkeypatch.setattr(kernel, "update", lambda self, x_BTI: found.append(type(self)) or x_BTI.new_zeros(2, 1, 3))
    model = nn.Sequential(nn.Linear(4, 3))
    adapters = [
        Adapter(name, "tiny", {"0": Factors(torch.ones(r, 4), torch.ones(3, r))}) for name, r in (("a", 1), ("b", 2))
    ]
    with Composer(model, adapters).activate([{"a": 1.0}, {"b": 1.0}]):
        model(torch.ones(2, 1, 4))
    assert found == [TritonGathered if path == "triton_gathered" else TritonSegments]
