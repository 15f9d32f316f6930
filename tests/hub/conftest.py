from __future__ import annotations

import pytest
from warm_workers import warm_workers as warm_workers

from loraweave.hub.hub import Hub


@pytest.fixture
def hub(tmp_path):
    """An empty hub."""
    with Hub(tmp_path / "hub") as opened:
        yield opened
