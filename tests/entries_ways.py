"""Both ways to the entries of an update."""

from __future__ import annotations

import pytest

from loraweave.composer.merge.methods import _entries


@pytest.fixture(params=["compiled", "PyTorch"])
def entries_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Entries by the library of entries.c, and without it."""
    if request.param == "PyTorch":
        monkeypatch.setattr(_entries, "library", lambda: None)
    elif _entries.library() is None:
        pytest.skip("there is no C compiler")
    return str(request.param)
