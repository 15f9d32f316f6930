"""The processes that `torchrun` or `accelerate launch` started: all take the same steps, each with rows of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from loraweave.common.process import launched_processes
from loraweave.common.state import tensor_bytes
from loraweave.errors import TrainingError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """The launched processes: this one is number `rank` of `count`, with its model on `device`. All make the same calls."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @classmethod
    def launched(cls, device: torch.device) -> Self:
        """Return the launched processes, connected by accelerate; without a launch this one alone."""
        if launched_processes() == 1:
            return cls(device)
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu")
        return cls(device, state.process_index, state.num_processes)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the items of this process."""
        return items[self.rank :: self.count]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of all processes' values, to the same bits in each."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Give every parameter the sum of its gradients over processes; a missing one counts as zero."""
        for parameter in parameters if self.count > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def least(self, value: int | None) -> int | None:
        """Return the smallest of the values, which all processes have, or none has."""
        return None if value is None else int(self._reduced(torch.tensor(value), dist.ReduceOp.MIN))

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def require_alike(self, what: str, said: str, tensors: Iterable[Tensor] = ()) -> None:
        """Raise TrainingError in every process if one begins with something else."""
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
