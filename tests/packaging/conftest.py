"""A copy of what is installed: a build leaves folders beside its sources."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("hub", "retrieval", "routers", "composer", "serving", "extensions")
FILES = ("pyproject.toml", "setup.py", "LICENSE", "NOTICE", "README.md")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The copy's folder."""
    folder = tmp_path_factory.mktemp("source")
    for name in (*ROOMS, "loraweave"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder
