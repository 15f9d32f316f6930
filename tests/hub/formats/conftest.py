"""The tiny models of foreign_models.py, as a fixture: test modules cannot import each other here."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def foreign():
    spec = spec_from_file_location("foreign_models", Path(__file__).with_name("foreign_models.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
