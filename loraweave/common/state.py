"""The state of a running training: safetensors, visible only once complete."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from loraweave.common.files import whole_file
from loraweave.errors import TrainingError

logger = logging.getLogger(__name__)

# the subfolder of a checkpoint for states of unfinished jobs
RUNNING = "running"
# the tensor of a file that holds `about`, as the bytes of JSON
REPORT = "report"


@dataclass(frozen=True)
class TrainingState:
    """The parameters and AdamW moments after `step` steps; `about` is any JSON that is kept with them."""

    step: int
    tensors: dict[str, Tensor]
    about: Any = None

    @classmethod
    def of(cls, step: int, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> TrainingState:
        tensors: dict[str, Tensor] = {}
        for index, parameter in enumerate(parameters):
            tensors[f"{index}.value"] = parameter.detach().clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{index}.{moment}"] = optimizer.state[parameter][moment].clone()
        return cls(step, tensors)

    def restore(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Put the state back and return the number of steps already done."""
        with torch.no_grad():
            for index, parameter in enumerate(parameters):
                parameter.copy_(self.tensors[f"{index}.value"])
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": self.tensors[f"{index}.exp_avg"].to(parameter.device),
                    "exp_avg_sq": self.tensors[f"{index}.exp_avg_sq"].to(parameter.device),
                }
        return self.step


def checkpoint_folder(given: str | Path | None) -> Path | None:
    """Return the folder for the states of a training, created if needed; None for None.

    Raises TrainingError unless the value is a path, and for a folder that cannot be created or written to.
    """
    if given is None:
        return None
    if not isinstance(given, str | Path):
        raise TrainingError(f"checkpoint is {given!r:.60}; it must be a folder, or None")
    folder = Path(given)
    try:
        running = folder / RUNNING
        running.mkdir(parents=True, exist_ok=True)
        # an existing folder may belong to another user
        tempfile.TemporaryFile(dir=running).close()
    except OSError as error:
        raise TrainingError(
            f"checkpoint is {str(folder)!r}, which cannot be made a folder to write in ({error}): name another"
        ) from error
    return folder


def save_state(folder: Path, key: str, state: TrainingState, *, place: str = RUNNING) -> None:
    """Write the state under a temporary name, then rename. A full disk is logged and does not end the training."""
    path = folder / place / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"step": torch.tensor([state.step]), **state.tensors}
    if state.about is not None:
        tensors[REPORT] = torch.frombuffer(bytearray(json.dumps(state.about).encode()), dtype=torch.uint8)
    try:
        with whole_file(path) as temporary:
            save_tensors(tensors, temporary)
    except OSError as error:
        logger.warning("the checkpoint at step %d was not written (%s); training goes on", state.step, error)


def load_state(folder: Path, key: str, *, place: str = RUNNING) -> TrainingState | None:
    """Return the last complete state, or None; a damaged file is logged and ignored."""
    path = folder / place / f"{key}.safetensors"
    if not path.is_file():
        return None
    try:
        # in one read: safetensors opens a file twice, and it may be replaced in between
        tensors = load(path.read_bytes())
        report = tensors.pop(REPORT, None)
        about = None if report is None else json.loads(bytes(report.tolist()))
        return TrainingState(int(tensors.pop("step")), tensors, about)
    except (SafetensorError, KeyError, ValueError) as error:
        logger.warning("the checkpoint %s is damaged (%s); its jobs start again", path, error)
        return None


def drop_state(folder: Path, key: str) -> None:
    """Remove the state of jobs that are finished."""
    (folder / RUNNING / f"{key}.safetensors").unlink(missing_ok=True)


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the tensors as a file of safetensors: the same bytes for the same bits."""
    raw: bytes = save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
    return raw


# what safetensors says of a failed write: "I/O error: No space left on device (os error 28)"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write the file. Raises OSError with the error number if the file system fails; safetensors hides it."""
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
