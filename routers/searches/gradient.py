"""Weights learned by gradient descent on a few examples, with the experts frozen.

Three published forms. `softmax` (Asadi et al. 2024, arXiv 2402.15414): w_l = softmax(p_l) over the experts of each layer,
p = 0 at first, which is the uniform mixture. `free` (LoRA Soups' CAT, Prabhakar et al. 2025, arXiv 2410.13025): a weight of
any sign for each expert and layer. `softmax_bias` (LoRA-Flow, Wang et al. 2024, arXiv 2402.11455, in its task-level limit):
softmax(W_g x) + b with a gate that sees no input, which leaves softmax(p) + b. The paper's secondary sources disagree on
where the bias is; outside the softmax, as here, weights can leave the simplex.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from loraweave.common.options import Count, Positive
from loraweave.errors import WeightingError
from loraweave.registry import traits
from loraweave.routers.searches._solver import Solver
from loraweave.routers.searches._space import Space, layer_groups

# the least weight that a softmax begins with, as a share of the even weight 1/E
LEAST_SHARE = 0.1


class Free:
    """The form w = p of the weights, of any sign and sum; a subclass has another formula from parameters p to weights w."""

    def __init__(self, space: Space) -> None:
        self.space = space

    @property
    def size(self) -> int:
        """The number of parameters."""
        return self.space.size

    def parameters(self, vector: np.ndarray) -> np.ndarray:
        """Return the p that gives the weights `vector`, or near weights if the form cannot express them."""
        return vector

    def vector(self, parameters: np.ndarray) -> np.ndarray:
        """Return the weights w(p) for the parameters p, flat, as one vector of the space."""
        return parameters

    def pull(self, parameters: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Return d loss / d p at the parameters p, given d loss / d w as `gradient`."""
        return gradient

    def inside(self, parameters: np.ndarray) -> np.ndarray:
        """Return the parameters, changed as little as needed to bring their weights into [low, high]."""
        return np.asarray(np.clip(parameters, self.space.low, self.space.high))


class Softmax(Free):
    """The form w = softmax(p) over the experts of each group: positive, and of sum 1.

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

    def inside(self, parameters: np.ndarray) -> np.ndarray:
        """Return the parameters unchanged, since the weights of a softmax are always within [low, high]."""
        return parameters

    def _by_group(self, vector: np.ndarray) -> np.ndarray:
        return vector.reshape(-1, len(self.space.experts))


class SoftmaxBias(Free):
    """The form w = softmax(p) + b, parameters p then b: the bias lets weights leave the simplex."""

    def __init__(self, space: Space) -> None:
        super().__init__(space)
        # the softmax may be anywhere on the simplex, whatever the box of the sum
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
        """Return the step to add to the parameters after one more gradient."""
        self._count += 1
        first, second = self.betas
        self._mean = first * self._mean + (1 - first) * gradient
        self._square = second * self._square + (1 - second) * gradient**2
        mean = self._mean / (1 - first**self._count)
        square = self._square / (1 - second**self._count)
        return np.asarray(-lr * mean / (np.sqrt(square) + self.eps))


FORMS: Mapping[str, type[Free]] = {"softmax": Softmax, "free": Free, "softmax_bias": SoftmaxBias}
# the largest step of Adam for each form: held for all steps, 0.05 overfits five examples; ended at zero, 0.04 beats 0.02
RATES = {"softmax": 0.3, "free": 0.04, "softmax_bias": 0.05}
WARMUP = 2


@traits("orderless")
@dataclass(eq=False, kw_only=True)
class Gradient(Solver):
    """A search that takes one step of Adam for each candidate told, and returns the best candidate, not the last.

    With `layers`, those of the pool, each layer has weights of its own; with `groups` each group has. Without both, or with
    `by_layer=False`, all layers share them. By default softmax and free weights go by layer and `softmax_bias` does not.
    Without a start it begins at the uniform mixture; a softmax begins as near to the start as it can. `lr` is Adam's largest
    (by default 0.3 for logits, 0.04 for free weights, 0.05 for softmax and bias): with `schedule="cosine"` two steps of half
    of it are followed by half a cosine down to 0 at the end of the budget; "constant", and a budget in seconds alone, keep
    it. With `patience`, that many candidates in a row without a lower loss end the search. A candidate that cannot be scored
    sends it back to the best one, with half the step from then on. Penalties belong to the objective; the other arguments
    are `Solver`'s.
    """

    needs_gradients: ClassVar[bool] = True
    cost: ClassVar[int] = 2

    layers: Sequence[str] | None = None
    by_layer: bool | None = None
    form: Literal["softmax", "free", "softmax_bias"] = "free"
    lr: Positive | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    betas: Sequence[float] = (0.9, 0.999)
    patience: Count | None = None

    def __post_init__(self) -> None:
        if self.lr is None:
            self.lr = RATES[self.form]
        if self.start is None:
            self.start = dict.fromkeys(self.experts, 1 / max(len(self.experts), 1))
        by_layer = self.form != "softmax_bias" if self.by_layer is None else self.by_layer
        self.groups = layer_groups(self.groups, self.layers, by_layer=by_layer)
        self._step = self.lr
        super().__post_init__()
        self._form = FORMS[self.form](self.space)
        self._parameters = self._form.parameters(self.first)
        self._adam = Adam(self._form.size, self.betas)
        # the parameters of the lowest loss, that loss, and the gradient by them
        self._best: tuple[np.ndarray, float, np.ndarray] | None = None
        self._fruitless = 0

    @classmethod
    def begins(cls, options: Mapping[str, Any]) -> str | None:
        """Name the best default start: the three best adapters for free weights, the uniform mixture for other forms."""
        return "best_three" if options.get("form", "free") == "free" else "uniform"

    @property
    def num_trained(self) -> int:
        return self._form.size

    def _propose(self) -> list[np.ndarray]:
        return [self._form.vector(self._parameters)]

    def _learn(self, vectors: Sequence[np.ndarray], losses: Sequence[float], gradients: Sequence[np.ndarray]) -> None:
        loss = losses[0]
        if math.isfinite(loss):
            gradient = self._form.pull(self._parameters, gradients[0])
            better = self._best is None or loss < self._best[1]
            if better:
                self._best = self._parameters, loss, gradient
            self._fruitless = 0 if better else self._fruitless + 1
        elif self._best is None:
            # nothing is known of where it would be better
            self._finished = True
            return
        else:
            self._parameters, _, gradient = self._best
            self._step /= 2
            self._fruitless += 1
        self._parameters = self._form.inside(self._parameters + self._adam.step(gradient, self._step * self._factor()))
        self._finished = self.patience is not None and self._fruitless >= self.patience

    def _factor(self) -> float:
        """Return the share of the step to take now, 0 to 1."""
        if self.schedule == "constant" or self.budget is None:
            return 1.0
        steps, made = self.budget // self.cost, len(self._vectors)
        warmup = min(WARMUP, steps // 3)
        # the step before the last candidate is the last that is taken
        return 0.5 if made <= warmup else 0.5 * (1 + math.cos(math.pi * (made - warmup) / max(steps - warmup, 1)))

    def _require_options(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise WeightingError(f"betas are {self.betas!r}; Adam has two, each at least 0 and below 1")
