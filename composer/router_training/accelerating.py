"""accelerate, for as long as a training takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loraweave.errors import TrainingError


@contextmanager
def accelerating(device: torch.device, mixed_precision: str) -> Iterator[Any]:
    """An Accelerator for products of this precision on that device; where the caller has none, none is left.

    Raises TrainingError where the caller's own was made for another precision, which accelerate has one of in a process.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized

    own = not is_initialized()
    try:
        try:
            accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")
        except ValueError as error:
            raise TrainingError(
                f"mixed_precision={mixed_precision!r} does not fit the Accelerator that this process has already: {error}"
            ) from error
        if accelerator.num_processes > 1:
            raise TrainingError(
                f"a router is trained in one process, but {accelerator.num_processes} were launched: start one; a large "
                "model may be spread over devices by device_map"
            )
        yield accelerator
    finally:
        if own:
            AcceleratorState._reset_state(reset_partial_state=True)
