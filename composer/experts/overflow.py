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

    A row's targets are its last tokens, so that most of what the first tokens leave over is taken from them. Where labels
    are not those of tokens, all tokens count.
    """

    def __init__(self, model: ExpertModel, report: TrainingReport) -> None:
        self._recipe, self._report = model.recipe, report
        gates = [gate for gate in model.gates.values() if isinstance(gate, TokenGate) and gate.capacity is not None]
        self._most = gates[0].most if gates else 0
        # experts that had no capacity left, and all that were chosen
        self._counts = torch.zeros(2, dtype=torch.float64)
        self._warned = False
        self._whose = "tokens before a target"

    def saw(self, w_BTE: Mapping[str, Tensor], labels_BK: Tensor | None) -> None:
        """The weights of each site in a pass of the running step, and the labels of its last tokens; None: all count."""
        if not self._most:
            return
        if labels_BK is None:
            self._whose = "tokens"
            counted = [each.flatten(0, 1) for each in w_BTE.values()]
        else:
            before_BK = functional.pad((labels_BK != IGNORED)[:, 1:], (0, 1))
            num_rows, num_last = before_BK.shape
            seen = [each for each in w_BTE.values() if len(each) == num_rows and each.shape[1] >= num_last]
            counted = [each[:, -num_last:][before_BK] for each in seen]
        if counted:
            chosen = self._most * sum(len(w_NE) for w_NE in counted)
            kept = torch.stack([(w_NE != 0).sum() for w_NE in counted]).sum()
            self._counts += torch.tensor([chosen - int(kept), chosen], dtype=torch.float64)

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
                f"recipe {self._recipe.name!r}: over the last {WINDOW} steps {recent:.0%} of the experts that "
                f"{self._whose} chose had no capacity left. Evaluation has no such limit, so that experts then see tokens "
                f"they have not learned from: take {by_weight}a larger capacity, None for no limit, or a larger balance",
                stacklevel=5,
            )
        return f"  overflow {shares[-1]:.0%}"
