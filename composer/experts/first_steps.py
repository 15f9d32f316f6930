"""Whether the first steps have reached all that is to learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from loraweave.composer.experts.settings import ExpertSettings
from loraweave.composer.router_training.passes import Stream
from loraweave.routers.experts._recipe import Recipe


class FirstSteps:
    """Notes which parameters have got a gradient.

    One factor of an expert begins as 0: in the first step it alone has a gradient, and the other factor and the gates have
    one from the second on, or from the recipe's `num_first_steps`. What belongs to tasks is due when each has had a row.
    """

    def __init__(
        self,
        recipe: Recipe,
        parameters: Mapping[str, nn.Parameter],
        rows: Sequence[Any],
        settings: ExpertSettings,
    ) -> None:
        self._recipe, self._settings = recipe, settings
        self._parameters = parameters
        self._stream = Stream(rows, settings.seed, "rows")
        self._unseen = {row.expert for row in rows} if recipe.needs_tasks else set()
        self._due = set(parameters)

    def silent(self, number: int) -> str:
        """After the backward passes of a step: what to say of parameters that should have a gradient and have none."""
        if not self._due:
            return ""
        self._due -= {name for name in self._due if bool(self._parameters[name].grad.any())}  # type: ignore[union-attr]
        if number > 1:
            self._unseen -= {row.expert for row in self._stream.at(number - 1, self._settings.batch_size)}
        silent = sorted(name for name in self._due if number >= self._recipe.num_first_steps or not self._waits(name))
        if not silent or self._unseen or (number == 1 and self._recipe.needs_tasks):
            return ""
        shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
        return (
            f"{len(silent)} parameters of recipe {self._recipe.name!r} had no gradient after {number} steps: {shown}. What "
            "is not to learn is frozen with requires_grad_(False)"
        )

    def _waits(self, name: str) -> bool:
        return name.startswith("gates.") or any(part in name for part in self._recipe.silent_at_first)
