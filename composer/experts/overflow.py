"""What the capacity of experts takes away in a training, which evaluation, without a limit, does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.composer.batches import IGNORED
from loraweave.composer.router_training.watch import WINDOW
from loraweave.routers.gates.token_gate import TokenGate
from loraweave.routers.routing.training_report import TrainingReport

if TYPE_CHECKING:
    from loraweave.composer.experts.expert_model import ExpertModel

MUCH = 0.2


class Overflow:
    """Of the experts that tokens before a target chose, the share that had no capacity left, step by step.

    A row's targets are its last tokens, so that most of what the first tokens leave over is taken from them.
    """

    def __init__(self, model: ExpertModel, report: TrainingReport) -> None:
        self._recipe, self._report = model.recipe, report
        gates = [gate for gate in model.gates.values() if isinstance(gate, TokenGate) and gate.capacity is not None]
        self._most = gates[0].most if gates else 0
        # experts that had no capacity left, and all that were chosen
        self._counts = torch.zeros(2, dtype=torch.float64)
        self._warned = False

    def saw(self, w_BTE: Mapping[str, Tensor], labels_BK: Tensor) -> None:
        """The weights of each site in a pass of the running step, and the labels of its last tokens."""
        if not self._most:
            return
        before_BK = functional.pad((labels_BK != IGNORED)[:, 1:], (0, 1))
        num_rows, num_last = before_BK.shape
        counted = [each for each in w_BTE.values() if len(each) == num_rows and each.shape[1] >= num_last]
        if counted:
            chosen = len(counted) * self._most * before_BK.sum()
            kept = torch.stack([(each[:, -num_last:][before_BK] != 0).sum() for each in counted]).sum()
            self._counts += torch.stack([chosen - kept, chosen]).cpu()

    def stepped(self, number: int, summed: Callable[[Tensor], Tensor]) -> str:
        """The step, the `number`th, is over: what to show of it. Warns, once, when much has overflowed for some steps.

        `summed` adds up over processes.
        """
        if not self._most:
            return ""
        dropped, chosen = summed(self._counts).tolist()
        self._counts = torch.zeros_like(self._counts)
        shares = self._report.overflow
        shares.append(dropped / max(chosen, 1.0))
        recent = sum(shares[-WINDOW:]) / WINDOW
        if len(shares) >= WINDOW and recent > MUCH and not self._warned:
            self._warned = True
            by_weight = "prioritised=True, " if self._recipe.options.get("prioritised") is False else ""
            warnings.warn(
                f"recipe {self._recipe.name!r}: over the last {WINDOW} steps {recent:.0%} of the experts that tokens before "
                "a target chose had no capacity left. Evaluation has no such limit, so that experts then see tokens they "
                f"have not learned from: take {by_weight}a larger capacity, None for no limit, or a larger balance",
                stacklevel=5,
            )
        return f"  overflow {shares[-1]:.0%}"
