"""AdaMerging: weights learned without labels, by the entropy of the predictions (Yang et al., ICLR 2024, arXiv 2310.02575).

Gradient descent on one weight per expert (task-wise), or per expert and layer (layer-wise), from 0.3 each. The objective is
chosen separately: the published one is the Shannon entropy of the predictions on unlabelled inputs. It is transductive,
since it needs inputs of every task that the mixture is for, and it needs predictions over classes: confident ones need not
be right ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from loraweave.extend import Count
from loraweave.extend.routing import Gradient

# as published: 1000 steps of 1e-3 from 0.3, so that a weight can go about 1 from where it began
START = 0.3
REACH = 1.0
BUDGET = 2000


@dataclass(eq=False, kw_only=True)
class Adamerging(Gradient):
    """A `Gradient` search over free weights that starts at 0.3 each and takes 1000 steps of lr 1e-3, as published.

    Layer-wise where `layers` are given, task-wise with `by_layer=False`. A step costs two evaluations of the budget. Another
    budget changes the number of steps, and the default `lr` to 1 / steps: a weight moves by about `lr` a step, so by about 1
    in all. One form of the published code clamps weights to [0, 1], as low=0, high=1 does here.
    """

    loss: ClassVar[str] = "entropy"

    budget: Count | None = BUDGET
    by_layer: bool | None = True
    form: Literal["free"] = field(default="free", init=False)
    schedule: Literal["constant"] = field(default="constant", init=False)

    def __post_init__(self) -> None:
        if self.lr is None:
            self.lr = REACH / max((BUDGET if self.budget is None else self.budget) // self.cost, 1)
        if self.start is None:
            self.start = dict.fromkeys(self.experts, START)
        super().__post_init__()

    @classmethod
    def begins(cls, options: Mapping[str, Any]) -> str | None:
        """Return None: the search starts at 0.3 each, as published."""
        return None
