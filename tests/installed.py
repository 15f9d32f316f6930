"""What a test asks of an entry that an extension brings: the test is skipped where that extension has been taken away."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraweave import registry


def needs_entry(folder: str, name: str) -> pytest.MarkDecorator:
    """Return the mark of a test that is skipped where a registry has no such entry."""
    return pytest.mark.skipif(name not in registry.names(folder), reason=_missing(folder, name))


def require_entry(folder: str, name: str) -> None:
    """Skip the test, from inside or from a fixture, where a registry has no such entry."""
    if name not in registry.names(folder):
        pytest.skip(_missing(folder, name))


def rebuild(folder: Path) -> list[str]:
    """Rebuild a hub's catalogue; skip the test where the extension that does so has been taken away."""
    names: list[str] = pytest.importorskip(f"{registry.EXTENSIONS}.upkeep").rebuild(folder)
    return names


def _missing(folder: str, name: str) -> str:
    return f"no entry {name!r} of {folder} is installed"
