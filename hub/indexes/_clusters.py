"""Spherical k-means: directions that vectors gather around (Dhillon and Modha 2001)."""

from __future__ import annotations

import numpy as np

# so few vectors a centre settle it nearly as well as all, at a fraction of the work
_SAMPLES_PER_CENTRE = 32
_NUM_ROUNDS = 6
_BLOCK_ROWS = 4096


def find_centres(vectors_ND: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """`count` unit vectors (count, D), from a sample drawn by the seed: the same vectors give the same centres."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(vectors_ND))[: count * _SAMPLES_PER_CENTRE])
    sample_SD = _unit(vectors_ND[chosen])
    centres_CD = sample_SD[np.sort(rng.permutation(len(sample_SD))[:count])]
    for _ in range(_NUM_ROUNDS):
        nearest_S = nearest(sample_SD, centres_CD)
        order_S = np.argsort(nearest_S, kind="stable")
        used_U, first_U = np.unique(nearest_S[order_S], return_index=True)
        # a centre without a vector moves to one of the sample, where it can win some
        centres_CD = sample_SD[rng.integers(len(sample_SD), size=count)]
        centres_CD[used_U] = _unit(np.add.reduceat(sample_SD[order_S], first_U, axis=0))
    return centres_CD


def nearest(vectors_ND: np.ndarray, centres_CD: np.ndarray) -> np.ndarray:
    """The centre with the largest inner product for each vector (N,)."""
    found_N = np.empty(len(vectors_ND), np.int64)
    for start in range(0, len(vectors_ND), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        found_N[part] = (vectors_ND[part] @ centres_CD.T).argmax(axis=1)
    return found_N


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    norm_N = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    scaled: np.ndarray = vectors_ND / np.where(norm_N > 0, norm_N, 1)
    return scaled
