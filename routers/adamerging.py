"""AdaMerging: weights learned without labels, by the entropy of the predictions (Yang et al., ICLR 2024, arXiv 2310.02575).

Gradient descent on one weight per expert (task-wise), or per expert and layer (layer-wise), from 0.3 each. What is minimised
is the objective's matter: the published one is the Shannon entropy of the predictions on unlabelled inputs. It is
transductive, for it needs inputs of every task that the mixture is for, and it needs predictions over classes: confident
ones need not be right ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from loraweave.routers.gradient import Gradient
from loraweave.routers.mixture import MixtureWeights

# as published: 1000 steps of 1e-3 from 0.3, so that a weight can go about 1 from where it began
START = 0.3
REACH = 1.0
BUDGET = 2000


class Adamerging(Gradient):
    """`Gradient` of free weights with the published start, step and number of steps; 1000 steps are 2000 evaluations.

    Layer-wise where `layers` are given, task-wise with `by_layer=False`. Where the budget allows for other than 1000 steps,
    `lr` is by default 1 / steps, for a weight moves by about `lr` in each. The published code clamps weights to [0, 1] in
    one of its two forms: low=0, high=1 does.
    """

    loss: ClassVar[str] = "entropy"

    @classmethod
    def begins(cls, options: Mapping[str, Any]) -> str | None:
        """At 0.3 each, as published."""
        return None

    def __init__(
        self,
        experts: Sequence[str],
        *,
        budget: int | None = BUDGET,
        seconds: float | None = None,
        seed: int = 0,
        start: Mapping[str, float] | MixtureWeights | None = None,
        low: float = -1.5,
        high: float = 1.5,
        groups: Mapping[str, Sequence[str]] | None = None,
        layers: Sequence[str] | None = None,
        by_layer: bool = True,
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        patience: int | None = None,
    ) -> None:
        steps = max((BUDGET if budget is None else budget) // self.cost, 1)
        super().__init__(
            experts,
            budget=budget,
            seconds=seconds,
            seed=seed,
            start=dict.fromkeys(experts, START) if start is None else start,
            low=low,
            high=high,
            groups=groups,
            layers=layers,
            by_layer=by_layer,
            form="free",
            lr=REACH / steps if lr is None else lr,
            schedule="constant",
            betas=betas,
            patience=patience,
        )
