from __future__ import annotations

import gc

import pytest

from loraweave.common.process import paused_collector


def failing(seen):
    with paused_collector():
        seen.append(gc.isenabled())
        raise RuntimeError


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_off_in_the_block_and_afterwards_what_it_was(on):
    (gc.enable if on else gc.disable)()
    seen = []
    try:
        with pytest.raises(RuntimeError):
            failing(seen)
        assert (seen, gc.isenabled()) == ([False], on)
    finally:
        gc.enable()
