"""What objectives on a task's examples share: which examples, the terms for the weights, and the failures so far."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

from loraweave.composer.evaluation.failures import Failures
from loraweave.composer.evaluation.penalty import Penalty


class OnExamples:
    """`only` are the examples' indices among all of the task's; the views of an objective share what it has prepared."""

    only: tuple[int, ...]
    penalty: Penalty
    failures: Failures

    def view(self, only: Sequence[int], *, penalised: bool = True) -> Self:
        """The same objective on these examples, by their index among all of the task's; without terms unless `penalised`.

        It counts failures of its own.
        """
        found = copy.copy(self)
        found.only = tuple(only)
        found.failures = Failures()
        return found if penalised else found.penalised(Penalty(0.0, 0.0, 0.0))

    def penalised(self, penalty: Penalty) -> Self:
        """The same objective with these terms for the weights."""
        found = copy.copy(self)
        found.failures = Failures()
        found.penalty = penalty
        return found
