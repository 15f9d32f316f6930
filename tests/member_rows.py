"""A Composer of three adapters on a tiny model in float64, and three rows as a batch padded on a side."""

from __future__ import annotations

import pytest
import torch

from loraweave.composer.composer import Composer


@pytest.fixture
def engine_of(make_model, make_adapters, tokenizer):
    """engine_of("llama"): with a tokenizer unless `speaks` is False."""

    def make(kind, *, speaks=True):
        model = make_model(kind, dtype=torch.float64)
        return Composer(model, make_adapters(model, kind), tokenizer=tokenizer if speaks else None)

    return make


@pytest.fixture
def ids():
    """ids_BT of three rows of one length."""
    return torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def rows(ids):
    """The token ids of rows of 7, 4 and 6 tokens."""
    return [row[:length] for row, length in zip(ids, (7, 4, 6), strict=True)]


@pytest.fixture
def padded(rows):
    """padded("left"): the rows as a batch, filled up on that side."""

    def make(side):
        ids, mask = torch.zeros(2, 3, 7, dtype=torch.long)
        for number, row in enumerate(rows):
            place = slice(7 - len(row), 7) if side == "left" else slice(0, len(row))
            ids[number, place], mask[number, place] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    return make
