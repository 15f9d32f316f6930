"""How the weights that a gradient search trains are written in free parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from loraweave.errors import WeightingError
from loraweave.routers.searches._space import Space

# of what an expert has in an even mixture, the least that a softmax begins with
LEAST_SHARE = 0.1


class Form(ABC):
    """A map from parameters without bounds to the vectors of a space, with its derivative."""

    def __init__(self, space: Space) -> None:
        self.space = space

    @property
    def size(self) -> int:
        """The number of parameters."""
        return self.space.size

    @abstractmethod
    def parameters(self, vector: np.ndarray) -> np.ndarray:
        """Those that give this vector, or the one nearest to it in the form's sense."""

    @abstractmethod
    def vector(self, parameters: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def pull(self, parameters: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """The gradient by the parameters, from that by the vector."""

    def inside(self, parameters: np.ndarray) -> np.ndarray:
        """The parameters, changed as little as puts their vector into the box."""
        return parameters


class Free(Form):
    """w = p: any sign, any sum."""

    def parameters(self, vector: np.ndarray) -> np.ndarray:
        return vector

    def vector(self, parameters: np.ndarray) -> np.ndarray:
        return parameters

    def pull(self, parameters: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        return gradient

    def inside(self, parameters: np.ndarray) -> np.ndarray:
        return np.asarray(np.clip(parameters, self.space.low, self.space.high))


class Softmax(Form):
    """w = softmax(p) over the experts of each group: positive, and of sum 1.

    Any other vector is changed into one: negative weights count as 0, all are divided by their sum, and those below
    LEAST_SHARE / E are raised to it; where nothing is positive, the weights are even.
    """

    def __init__(self, space: Space) -> None:
        super().__init__(space)
        if space.low > 0 or space.high < 1:
            raise WeightingError(
                f"softmax weights go from 0 to 1, but the bounds are [{space.low}, {space.high}]; widen them, or take the "
                "form 'free'"
            )

    def parameters(self, vector: np.ndarray) -> np.ndarray:
        w_GE = np.maximum(self._by_group(vector), 0)
        sum_G1 = w_GE.sum(axis=1, keepdims=True)
        even_GE = np.full_like(w_GE, 1 / w_GE.shape[1])
        share_GE = np.divide(w_GE, sum_G1, out=even_GE.copy(), where=sum_G1 > 0)
        # a weight of 0 would never learn
        return np.asarray(np.log(np.maximum(share_GE, LEAST_SHARE * even_GE)).flatten())

    def vector(self, parameters: np.ndarray) -> np.ndarray:
        p_GE = self._by_group(parameters)
        powers_GE = np.exp(p_GE - p_GE.max(axis=1, keepdims=True))
        return np.asarray((powers_GE / powers_GE.sum(axis=1, keepdims=True)).flatten())

    def pull(self, parameters: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        w_GE, gradient_GE = self._by_group(self.vector(parameters)), self._by_group(gradient)
        mean_G1 = (w_GE * gradient_GE).sum(axis=1, keepdims=True)
        return np.asarray((w_GE * (gradient_GE - mean_G1)).flatten())

    def _by_group(self, vector: np.ndarray) -> np.ndarray:
        return vector.reshape(-1, len(self.space.experts))


class SoftmaxBias(Form):
    """w = softmax(p) + b, parameters p then b: the bias lets weights leave the simplex."""

    def __init__(self, space: Space) -> None:
        super().__init__(space)
        # its part of the sum may be anywhere on the simplex, whatever the box of the whole
        self._softmax = Softmax(Space(space.experts, -1.0, 1.0, space.groups))

    @property
    def size(self) -> int:
        return 2 * self.space.size

    def parameters(self, vector: np.ndarray) -> np.ndarray:
        even = np.zeros(self.space.size)
        return np.concatenate([even, vector - self._softmax.vector(even)])

    def vector(self, parameters: np.ndarray) -> np.ndarray:
        p, b = np.split(parameters, 2)
        return np.asarray(self._softmax.vector(p) + b)

    def pull(self, parameters: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        p, _ = np.split(parameters, 2)
        return np.concatenate([self._softmax.pull(p, gradient), gradient])

    def inside(self, parameters: np.ndarray) -> np.ndarray:
        p, _ = np.split(parameters, 2)
        vector = np.clip(self.vector(parameters), self.space.low, self.space.high)
        return np.concatenate([p, vector - self._softmax.vector(p)])


class Adam:
    """The steps of Adam (Kingma and Ba 2015, arXiv 1412.6980) with its bias correction, in float64."""

    def __init__(self, size: int, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8) -> None:
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
