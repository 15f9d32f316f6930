"""Weights learned by gradient descent on a few examples, the experts frozen.

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
from loraweave.routers.searches._forms import Adam, Form, Free, Softmax, SoftmaxBias
from loraweave.routers.searches._solver import Solver
from loraweave.routers.searches._space import layer_groups

FORMS: Mapping[str, type[Form]] = {"softmax": Softmax, "free": Free, "softmax_bias": SoftmaxBias}
# the largest step of Adam for each form: held for all steps, 0.05 overfits five examples; ended at zero, 0.04 beats 0.02
RATES = {"softmax": 0.3, "free": 0.04, "softmax_bias": 0.05}
WARMUP = 2


@traits("orderless")
@dataclass(eq=False, kw_only=True)
class Gradient(Solver):
    """Takes one step of Adam for each candidate told, and returns the best candidate, not the last.

    `layers`, those of the pool, have weights of their own, each or by `groups`; without both, or with `by_layer=False`, all
    share theirs. By default softmax and free weights go by layer and `softmax_bias` does not. Without a start it begins at
    the uniform mixture; a softmax begins as near to the start as it can. `lr` is Adam's largest (by default 0.3 for logits,
    0.04 for free weights, 0.05 for softmax and bias): with `schedule="cosine"` two steps of half of it are followed by half
    a cosine down to 0 at the end of the budget; "constant", and a budget in seconds alone, keep it. With `patience`, so
    many candidates on end without a lower loss end the search. A candidate that cannot be scored sends it back to the best
    one, with half the step from then on. Penalties are the objective's matter; the other arguments are `Solver`'s.
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
        """Free weights go best from the three best adapters, the published softmax from all alike."""
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
        """What of the step is taken now, 0 to 1."""
        if self.schedule == "constant" or self.budget is None:
            return 1.0
        steps, made = self.budget // self.cost, len(self._vectors)
        warmup = min(WARMUP, steps // 3)
        # the step before the last candidate is the last that is taken
        return 0.5 if made <= warmup else 0.5 * (1 + math.cos(math.pi * (made - warmup) / max(steps - warmup, 1)))

    def _require_options(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise WeightingError(f"betas are {self.betas!r}; Adam has two, each at least 0 and below 1")
