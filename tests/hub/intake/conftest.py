"""The stand-in for the model hub, and the process that loads from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("model_hub.py")


@pytest.fixture(scope="session")
def model_hub():
    """The module model_hub.py."""
    spec = spec_from_file_location("model_hub", DRIVER)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def loaded_from():
    """loaded_from(address, home, *arguments): what the driver found with that model hub and cache, and all it printed."""

    def run(address, home, *arguments, **variables):
        plain = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, str(DRIVER), *map(str, arguments)]
        environment = {**plain, **own, "OMP_NUM_THREADS": "1", **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return {**json.loads(done.stdout), "printed": done.stdout + done.stderr}

    return run
