"""Expected improvement (Jones, Schonlau and Welch 1998): how far below the best a normal loss is on average."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr


def expected_improvement(mean_N: np.ndarray, deviation_N: np.ndarray, best: float) -> np.ndarray:
    """E[max(best - y, 0)] for each y distributed as N(mean, deviation^2); a deviation of 0 is no uncertainty."""
    below_N = best - mean_N
    sure_N = deviation_N <= 0
    z_N = below_N / np.where(sure_N, 1.0, deviation_N)
    density_N = np.exp(-(z_N**2) / 2) / math.sqrt(2 * math.pi)
    expected_N = below_N * ndtr(z_N) + deviation_N * density_N
    return np.where(sure_N, np.maximum(below_N, 0.0), expected_N)
