"""A hub of two adapters trained on letters each, so that one after the other solves a third task."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import loraweave as lw
from loraweave import registry

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
LETTERS = {"one": dict(zip("abcd", "efgh", strict=True)), "two": dict(zip("efgh", "ijkl", strict=True))}
DESCRIPTIONS = {"one": "go on", "two": "do it"}


class OneDirection:
    """Every text is alike, so that a search finds all adapters in the order of the hub."""

    dim = 2
    id = "one direction"

    def embed(self, texts):
        return np.tile(np.array([1.0, 0.0], dtype=np.float32), (len(texts), 1))


@pytest.fixture(scope="session")
def trained_letters(make_model, tokenizer):
    """(model, adapters "one" and "two"), each of which answers four letters with four others."""
    model = make_model("llama")
    tasks = {name: lw.Task(list(pairs.items()), instruction=DESCRIPTIONS[name]) for name, pairs in LETTERS.items()}
    made = lw.train_adapters(
        model, tokenizer, tasks, target_modules=LAYERS, rank=8, steps=150, lr=1e-2, batch_size=4, progress=False
    )
    cards = {name: {"examples": list(pairs), "outputs": list(pairs.values())} for name, pairs in LETTERS.items()}
    return model, {name: replace(adapter, card={**adapter.card, **cards[name]}) for name, adapter in made.items()}


@pytest.fixture
def letter_hub(trained_letters, tmp_path, monkeypatch):
    """A hub of both and of an adapter that answers nothing in particular."""
    get = registry.get
    monkeypatch.setattr(registry, "get", lambda folder, name: OneDirection if folder == "embedders" else get(folder, name))
    _, adapters = trained_letters
    with lw.Hub(tmp_path / "hub") as hub:
        for name, adapter in adapters.items():
            hub.add(adapter, description=DESCRIPTIONS[name])
        noise = {layer: replace(f, b_OR=1e-3 * torch.ones_like(f.b_OR)) for layer, f in adapters["one"].layers.items()}
        hub.add(replace(adapters["one"], name="nothing", layers=noise, card={}), description="say no")
        yield hub
