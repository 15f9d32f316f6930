"""The steps that jobs take together, seen from outside."""

from __future__ import annotations

import pytest

from loraweave.composer.train import shared


@pytest.fixture
def watch_steps(monkeypatch):
    """watch_steps(): a list that gets (rows, number of each job) of every step; the `kill_at`th step is interrupted."""

    def watch(kill_at=None):
        seen, original = [], shared.range_losses

        def losses(model, tokenizer, rows, row_counts):
            seen.append((rows, row_counts))
            if len(seen) == kill_at:
                raise KeyboardInterrupt
            return original(model, tokenizer, rows, row_counts)

        monkeypatch.setattr(shared, "range_losses", losses)
        return seen

    return watch
