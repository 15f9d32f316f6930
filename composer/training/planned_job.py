"""A job that waits for its turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraweave.composer.batches import EncodedRow
from loraweave.composer.training.held_out import HeldOut
from loraweave.composer.training.pace import Pace
from loraweave.composer.training.schedule import JobSize
from loraweave.composer.training.training_job import TrainingJob

# as many of a job's own batches tell how wide they are
MEASURED_STEPS = 32
# values, gradients and the two moments of AdamW
NUM_COPIES = 4


@dataclass(frozen=True)
class PlannedJob:
    """`make` gives the job of `num_parameters` when its turn comes. Its rows are drawn and its rate follows by `pace`."""

    name: str
    make: Callable[[], TrainingJob]
    num_parameters: int
    rows: Sequence[EncodedRow]
    pace: Pace
    held_out: HeldOut | None = None

    def size(self, *, is_encoder_decoder: bool) -> JobSize:
        """What it will bring to a step."""
        held_out = () if self.held_out is None else self.held_out.rows
        seen = [*self.rows, *held_out]
        steps = range(min(self.pace.steps, MEASURED_STEPS))
        widths = [max(len(row) for row in self.pace.rows(self.rows, self.name, step)) for step in steps]
        return JobSize(
            num_rows=self.pace.batch_size,
            width=sum(widths) / len(widths),
            longest=max(len(row.prompt) if is_encoder_decoder else len(row) for row in seen),
            longest_target=max(len(row.target) for row in seen),
            num_parameters=self.num_parameters,
            num_copies=NUM_COPIES + (self.held_out is not None),
        )
