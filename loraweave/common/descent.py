"""The parts that all training shares: steps of gradient descent, random numbers, and saved states.

The trainings of adapters, routers, experts, encoders and reward heads bring parameters and losses, and take their steps
here. Random numbers are derived from their purpose, and leave the caller's generators unchanged. A state is a safetensors
file, visible only once complete.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor, nn
from torch import distributed as dist

from loraweave.common.files import whole_file
from loraweave.common.process import launched_processes
from loraweave.errors import TrainingError

logger = logging.getLogger(__name__)

Made = TypeVar("Made")
Item = TypeVar("Item")

GRADIENT_LIMIT = 1.0


def warmed_cosine(highest: float, step: int, steps: int, warmup: int) -> float:
    """Return the learning rate of a step, from 0: linear warm-up to `highest` in `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Descent:
    """An AdamW optimizer with learning rates `rate(step)` and gradients clipped to the norm `limit` (None: not clipped).

    `fused` updates all parameters in one pass, which rounds differently.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        rate: Callable[[int], float],
        *,
        limit: float | None = GRADIENT_LIMIT,
        weight_decay: float = 0.0,
        fused: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate(0), weight_decay=weight_decay, fused=fused or None)
        self._rate, self._limit = rate, limit

    def step(self, number: int) -> None:
        """Clip the gradients and take step `number`, counted from 0; gradients are not reset."""
        if self._limit is not None:
            nn.utils.clip_grad_norm_(self.parameters, self._limit)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(number)
        self.optimizer.step()


def descend(
    learners: Mapping[str, Descent],
    losses: Callable[[int], Tensor],
    steps: int,
    bar: Progress,
    *,
    title: str,
    first: int = 0,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train the learners from step `first` to the end; `losses(step)` returns one loss for each learner, in their order.

    A loss must depend on its own learner's parameters alone. Raises TrainingError if a loss is not finite.
    """
    shown = bar.add_task(title, total=steps, completed=first, loss="")
    for step in range(first, steps):
        loss_J = losses(step).reshape(-1)
        backward(loss_J, dict.fromkeys(learners, step))
        for descent in learners.values():
            descent.step(step)
            descent.optimizer.zero_grad()
        if after_step is not None:
            after_step(step)
        bar.update(shown, advance=1, loss=f"loss {float(loss_J.detach().mean()):.3f}")


def backward(loss_J: Tensor, steps: Mapping[str, int], *, whole_J: Tensor | None = None) -> list[float]:
    """Backpropagate the sum of `loss_J`, one loss for each of J learners, and return the losses as floats.

    `steps` is {learner: step from 0}, in the order of `loss_J`. If `loss_J` holds only parts of losses, `whole_J` has the
    whole losses, which are checked and returned. Raises TrainingError, before any gradient changes, if a loss is not finite.
    """
    losses: list[float] = (loss_J if whole_J is None else whole_J).tolist()
    for (name, step), loss in zip(steps.items(), losses, strict=True):
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of {name} is {loss} at step {step + 1}; lower lr, or look for damaged examples")
    loss_J.sum().backward()  # type: ignore[no-untyped-call]
    return losses


class FlatParameters:
    """Parameters and gradients, moved into one vector for each dtype; parameters keep their shapes, strides and identity.

    Pass `vectors` to an optimiser. A parameter without a gradient gets a gradient of zeros.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self.vectors: list[Tensor] = list(map(_gathered, by_dtype.values()))

    def zero_grad(self) -> None:
        """Set the gradients to zero in place."""
        for vector in self.vectors:
            if vector.grad is not None:
                vector.grad.zero_()


def _gathered(parameters: Sequence[Tensor]) -> Tensor:
    vector = torch.empty(sum(map(Tensor.numel, parameters)), dtype=parameters[0].dtype, device=parameters[0].device)
    vector.grad = torch.zeros_like(vector)
    start = 0
    with torch.no_grad():
        for parameter in parameters:
            place = _like(parameter, vector, start)
            place.copy_(parameter)
            parameter.data = place
            parameter.grad = _like(parameter, vector.grad, start)
            start += parameter.numel()
    return vector.requires_grad_()


def _like(parameter: Tensor, vector: Tensor, start: int) -> Tensor:
    """Return the vector's part from `start` on, with the parameter's shape, and its strides if it has no gaps."""
    strides = torch.empty_like(parameter, device="meta").stride()
    return vector.as_strided(parameter.shape, strides, start)


def seeded(*parts: object) -> torch.Generator:
    """Make a generator on the CPU, seeded with a hash of repr(parts) and nothing else."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % 2**63)


def with_seed(seed: int, make: Callable[[], Made]) -> Made:
    """Return make(), called with torch's generator seeded; the caller's random numbers continue unaffected."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@contextmanager
def caller_randomness() -> Iterator[None]:
    """Let the block seed the generators of Python, numpy and torch, and restore them afterwards."""
    python, array = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


# the subfolder of a checkpoint for states of unfinished jobs
RUNNING = "running"
# the name of the tensor in a state's file that holds `about`, as the bytes of JSON
REPORT = "report"


@dataclass(frozen=True)
class TrainingState:
    """The parameters and AdamW moments after `step` steps; `about` is any JSON value that is saved with them."""

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
        """Copy the state into the parameters and the optimizer; return the number of steps already taken."""
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
    """Return the folder `given` for the states of a training, created if needed; None for None.

    Raises TrainingError unless `given` is a path, and for a folder that cannot be created or written to.
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
    """Write the state to its file, which appears whole; if that fails, log a warning and let the training go on."""
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
    """Return the state saved under `key`, or None if there is none; a damaged file is logged and ignored."""
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
    """Remove the saved state of jobs that are finished, if there is one."""
    (folder / RUNNING / f"{key}.safetensors").unlink(missing_ok=True)


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the tensors as the bytes of a safetensors file; tensors of the same bits give the same bytes."""
    raw: bytes = save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
    return raw


# in the message of safetensors about a failed write: "I/O error: No space left on device (os error 28)"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file. Raises OSError, whose number safetensors hides, if the file system fails."""
    try:
        save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@dataclass(frozen=True)
class Processes:
    """The processes that train together, all of which make the same calls: this is number `rank`, from 0, of `count`."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @classmethod
    def launched(cls, device: torch.device) -> Self:
        """Connect the processes that torchrun or accelerate launched; without a launch return this process alone."""
        if launched_processes() == 1:
            return cls(device)
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        return cls(device, state.process_index, state.num_processes)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's share of the items: every `count`-th item from number `rank` on."""
        return items[self.rank :: self.count]

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum of `values` over all processes, the same bits in each."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every parameter's gradient by its sum over all processes; a missing gradient counts as zero."""
        for parameter in parameters if self.count > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def least(self, value: int | None) -> int | None:
        """Return the smallest value that a process passes; None for None, which all processes or none must pass."""
        return None if value is None else int(self._reduced(torch.tensor(value), dist.ReduceOp.MIN))

    def wait(self) -> None:
        """Wait until every process has made this call."""
        if self.count > 1:
            dist.barrier()

    def require_alike(self, what: str, said: str, tensors: Iterable[Tensor] = ()) -> None:
        """Raise TrainingError in all processes, naming `what` is trained, unless all pass equal `said` and tensors."""
        if self.count == 1:
            return
        digest = hashlib.sha256(said.encode() + tensor_bytes({str(n): tensor for n, tensor in enumerate(tensors)})).digest()
        digest_number = torch.tensor(int.from_bytes(digest[:7]))
        if self._reduced(digest_number, dist.ReduceOp.MIN) != self._reduced(digest_number, dist.ReduceOp.MAX):
            raise TrainingError(
                f"the {self.count} launched processes do not train the same {what}: each must make the same call, with the "
                "same rows, seed and checkpoint; to train other things in each, start them without torchrun and accelerate"
            )

    def _reduced(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.count == 1:
            return values
        reduced = values.detach().to(self.device, copy=True)
        dist.all_reduce(reduced, op=how)
        return reduced
