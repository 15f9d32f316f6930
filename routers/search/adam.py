"""Adam, for a search whose state must follow from what it was told, bit for bit."""

from __future__ import annotations

import numpy as np


class Adam:
    """The steps of Adam (Kingma and Ba 2015, arXiv 1412.6980) with its bias correction, in float64."""

    def __init__(self, size: int, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.betas = betas
        self.eps = eps
        self._count = 0
        self._mean = np.zeros(size)
        self._square = np.zeros(size)

    def step(self, gradient: np.ndarray, lr: float) -> np.ndarray:
        """What is to be added to the parameters after one more gradient."""
        self._count += 1
        first, second = self.betas
        self._mean = first * self._mean + (1 - first) * gradient
        self._square = second * self._square + (1 - second) * gradient**2
        mean = self._mean / (1 - first**self._count)
        square = self._square / (1 - second**self._count)
        return np.asarray(-lr * mean / (np.sqrt(square) + self.eps))
