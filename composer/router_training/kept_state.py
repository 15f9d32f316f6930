"""A training's state in its checkpoint folder: parameters, moments, the best so far and the report, in one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from loraweave.composer.router_training.settings import TrainingSettings
from loraweave.retrieval.training_state import TrainingState, checkpoint_folder, load_state, save_state
from loraweave.routers.routing.training_report import TrainingReport

BEST, RECENT, REPORT = "best", "recent", "report"


class KeptRow(Protocol):
    """A row that says, as JSON, what it is."""

    def determining(self) -> list[Any]: ...


@dataclass(frozen=True)
class KeptState:
    """Where the state of one call of fit() is kept: in `folder`, if there is one, under a key of all that determines it."""

    folder: Path | None
    key: str

    @classmethod
    def of(
        cls,
        name: str,
        determining: Sequence[Any],
        settings: TrainingSettings,
        rows: Sequence[KeptRow],
        held: Sequence[KeptRow],
    ) -> Self:
        """`determining` is JSON of what is trained. Raises TrainingError for a folder that cannot be made."""
        if settings.checkpoint is None:
            return cls(None, "")
        folder = checkpoint_folder(settings.checkpoint)
        data = [[row.determining() for row in part] for part in (rows, held)]
        parts = [name, *determining, settings.determining(), data]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return cls(folder, f"{name}-{digest[:24]}")

    def save(
        self,
        step: int,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        best: Sequence[Tensor],
        recent: Sequence[Tensor],
        report: TrainingReport,
    ) -> None:
        """Visible only when whole. A full disk is said and does not end the training."""
        if self.folder is None:
            return
        tensors = TrainingState.of(step, parameters, optimizer).tensors
        for part, values in ((BEST, best), (RECENT, recent)):
            tensors |= {f"{index}.{part}": value for index, value in enumerate(values)}
        tensors[REPORT] = torch.frombuffer(bytearray(json.dumps(report.to_json()).encode()), dtype=torch.uint8)
        save_state(self.folder, self.key, TrainingState(step, tensors))

    def restore(
        self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> tuple[int, list[Tensor], list[Tensor], TrainingReport] | None:
        """(steps done, best parameters, recent loads, report) after putting the state back; None where there is none."""
        state = None if self.folder is None else load_state(self.folder, self.key)
        if state is None:
            return None
        step = state.restore(parameters, optimizer)
        report = TrainingReport.from_json(json.loads(bytes(state.tensors[REPORT].tolist())))
        return step, _numbered(state, BEST), _numbered(state, RECENT), report


def _numbered(state: TrainingState, part: str) -> list[Tensor]:
    names = (name for name in state.tensors if name.endswith(f".{part}"))
    return [state.tensors[name] for name in sorted(names, key=lambda name: int(name.partition(".")[0]))]
