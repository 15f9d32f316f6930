"""What tests of retrieval share: texts that are angles, so that every score follows from a cosine."""

from __future__ import annotations

import math

import numpy as np
import pytest


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
