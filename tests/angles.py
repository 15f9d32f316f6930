"""Texts that are angles, so that every score of a search follows from a cosine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.hub.search.search import SearchIndex
from loraweave.retrieval.query import KeySpace
from loraweave.types import Factors


class Plane:
    """Texts are angles in degrees, embedded on the unit circle; other texts point to 270."""

    dim = 2
    id = "plane"

    def embed(self, texts):
        angles = np.radians([float(text) if text.replace("-", "").isdigit() else 270.0 for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32).reshape(-1, 2)


@pytest.fixture
def plane():
    return Plane()


@pytest.fixture(scope="session")
def cosine():
    """cosine(degrees), as fp32 has it."""
    return lambda degrees: pytest.approx(math.cos(math.radians(degrees)), abs=3e-6)


@pytest.fixture
def score(tmp_path, plane):
    """score(key, query, angles of the samples, ...): the key's score of one adapter."""
    with Hub(tmp_path) as hub:
        space = KeySpace(hub, SearchIndex(hub, embedder=plane))

        def call(key, query, *samples, description="", **card):
            if "one" in hub:
                hub.remove("one")
            layers = {"layer": Factors(torch.ones(1, 3), torch.ones(2, 1))}
            record = hub.add(Adapter("one", "base", layers, card=card), examples=samples, description=description)
            return key.scores(query, [record], space)[0]

        yield call
