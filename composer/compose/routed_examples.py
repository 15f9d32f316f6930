"""What a router's weights come to on a task's examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loraweave.composer.compose.examples import EncodedExamples
from loraweave.composer.compose.objectives._row_sums import Kind
from loraweave.composer.compose.population import Job, row_sums
from loraweave.composer.composer import Composer
from loraweave.registry import get
from loraweave.types import Router, Task


class RoutedExamples:
    """The examples, tokenised once, each in a row of its own: a router may look at the row as a whole."""

    def __init__(self, engine: Composer, tokenizer: Any, task: Task) -> None:
        self._engine = engine
        self._kind: Kind = get("objectives", "cross_entropy")(task)
        self._encoded = EncodedExamples(engine.model, tokenizer, task, self._kind, trees=False)

    def scores(self, router: Router, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(loss_N, hit_N) of these examples: the mean loss of the target's tokens, and whether greedy decoding writes it."""
        needs = self._kind.needs | self._kind.hit_needs
        with self._engine.activate(router):
            (sums,) = row_sums(self._engine, self._encoded, [Job(None, tuple(examples))], needs)
        return self._kind.losses(sums).double().numpy(), self._kind.hits(sums).numpy()
