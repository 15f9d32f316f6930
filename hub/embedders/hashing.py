"""Signed feature hashing of character n-grams (Weinberger et al. 2009): embeddings from numpy alone.

It knows spelling, not meaning: for tests, machines without the sentence encoder, and adapters whose inputs differ in form.
"""

import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from loraweave.hub.embedders._embedder import readable

N_GRAM_SIZES = (2, 3, 4)


class Hashing:
    """Unit vectors of `dim` numbers, the same on every machine; case and Unicode form do not count."""

    def __init__(self, *, dim: int = 512) -> None:
        self.dim = dim

    @property
    def id(self) -> str:
        return f"hashing:crc32-{'-'.join(map(str, N_GRAM_SIZES))}:{self.dim}"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return embeddings (N, dim), fp32, unit norm, also for an empty text."""
        rows_ND = np.zeros((len(texts), self.dim), dtype=np.float64)
        for row_D, text in zip(rows_ND, texts, strict=True):
            for gram, count in _grams(text).items():
                value = zlib.crc32(gram.encode())
                # the lowest bit gives the sign, so that colliding n-grams cancel on average instead of adding up
                row_D[(value >> 1) % self.dim] += (1.0 if value & 1 else -1.0) * (1.0 + np.log(count))
        norms_N = np.linalg.norm(rows_ND, axis=1)
        rows_ND[norms_N == 0, 0] = 1.0
        norms_N[norms_N == 0] = 1.0
        unit_ND: np.ndarray = (rows_ND / norms_N[:, None]).astype(np.float32)
        return unit_ND


def _grams(text: str) -> Counter[str]:
    """Return how often each n-gram occurs inside the words, each word between two spaces."""
    words = unicodedata.normalize("NFKC", readable(text)).casefold().split() or [""]
    padded = [f" {word} " for word in words]
    grams = [word[start : start + size] for word in padded for size in N_GRAM_SIZES for start in range(len(word) - size + 1)]
    return Counter(grams)
