"""The memory of a step of training: estimated before the first one, and measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraweave.extend import BudgetExceeded, free_host_bytes
from loraweave.extend.scoring import EncodedRow, batch, context_length, pad_id, token_losses
from loraweave.extend.training import JobSize, SharedPass, StepMemory, TrainingJob

PROBED_TOKENS = 16
PROBED_TARGETS = 4
FACTOR_BYTES = 4
# copies of the logits beside those that autograd keeps: one in fp32, and their gradient
LOGIT_COPIES = 2
# the backward pass's share of what is kept, measured on the default base: without it, estimates were 0.90 of the true peak
BACKWARD_SHARE = 0.15


@dataclass(frozen=True)
class MemoryModel:
    """An estimate of a training step's peak memory in bytes, from what autograd keeps for one row.

    peak = weights + sum over jobs of 4 n c + 1.15 B (token_bytes T + pair_bytes T^2 + target_bytes K) + 2 * 4 B K V

    for B rows filled up to T tokens, of which K are targets over a vocabulary of V, and jobs of n parameters with c copies.
    What is kept is counted (`of`), not looked up by the kind of model: it is linear in K, and a polynomial in T whose square
    is what attention keeps of pairs of tokens, where it does. The 0.15 is for what the backward pass has in hand.
    """

    weight_bytes: int
    token_bytes: float
    pair_bytes: float
    target_bytes: float
    vocabulary: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, job: TrainingJob) -> MemoryModel:
        """Fit the model to what autograd keeps in three forwards of two short rows with this job in the model."""
        long = min(2 * PROBED_TOKENS, context_length(model) or 2 * PROBED_TOKENS)
        short = long // 2
        kept = partial(_kept_bytes, model, tokenizer, job)
        first, second, third = kept(short, 1), kept(long, 1), kept(long, 1 + PROBED_TARGETS)
        target_bytes = max(0.0, (third - second) / PROBED_TARGETS)
        first_each, second_each = (first - target_bytes) / short, (second - target_bytes) / long
        pair_bytes = max(0.0, (second_each - first_each) / (long - short))
        token_bytes = second_each - pair_bytes * long
        weights = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
        vocabulary = model.get_output_embeddings().weight.shape[0]
        return cls(weights, token_bytes, pair_bytes, target_bytes, vocabulary)

    def peak(self, jobs: Sequence[JobSize]) -> int:
        """Return the bytes of a step that trains these jobs together, including the base's weights."""
        rows = sum(job.num_rows for job in jobs)
        tokens, targets = max(job.longest for job in jobs), max(job.longest_target for job in jobs)
        trained = sum(FACTOR_BYTES * job.num_parameters * job.num_copies for job in jobs)
        kept = rows * (self.token_bytes * tokens + self.pair_bytes * tokens**2 + self.target_bytes * targets)
        logits = LOGIT_COPIES * FACTOR_BYTES * rows * targets * self.vocabulary
        return int(self.weight_bytes + trained + (1 + BACKWARD_SHARE) * kept + logits)


def _kept_bytes(model: Any, tokenizer: Any, job: TrainingJob, length: int, target: int) -> float:
    """Return the bytes that autograd keeps per row of these lengths, without the tensors of the model and the job."""
    # a decoder's targets are among its tokens
    token, prompt = pad_id(tokenizer), length if model.config.is_encoder_decoder else length - target
    # the second row is shorter, so that there is padding and its mask
    rows = [EncodedRow((token,) * length, (token,) * target) for length in (prompt, max(1, prompt - 1))]
    owned = chain(model.parameters(), model.buffers(), job.parameters())
    known = {storage.data_ptr() for tensor in owned for storage in _storages(tensor)}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        for storage in _storages(tensor):
            if storage.data_ptr() not in known:
                seen[storage.data_ptr()] = storage.nbytes()
        # an output that its own node keeps would keep the node: neither would ever be freed
        return tensor.detach()

    noting = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.enable_grad(), noting, SharedPass(model, [job], [len(rows)]):
        losses = token_losses(model, batch(model, tokenizer, rows))
    # what is kept lives as long as the losses do, so that no storage was counted for two
    del losses
    return sum(seen.values()) / len(rows)


def _storages(tensor: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of a tensor's values: those of its parts for a composite tensor such as torchao's and FSDP's."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _storages(getattr(tensor, name))
    elif isinstance(tensor, Tensor):
        yield tensor.untyped_storage()


STATUS = Path("/proc/self/status")


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that a process can still allocate on a device, including torch's cache; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_host_bytes() if device.type == "cpu" else None


def step_budget(memory: MemoryModel, device: torch.device) -> int | None:
    """Return the bytes that a step may take on the device, including the base's weights; None if unknown."""
    free = free_bytes(device)
    return None if free is None else free + memory.weight_bytes


class MemoryUse:
    """A measure of memory growth since its creation: torch's allocations on a CUDA device, else the whole process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peak = self._highest()
        self._begun: int | None = None
        if device.type == "cuda":
            self._begun = torch.cuda.memory_allocated(device)
        elif STATUS.is_file():
            fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
            self._begun = 1024 * int(fields["VmRSS"].split()[0])

    def grown(self) -> int | None:
        """Return the growth of the peak in bytes; None if an earlier peak was higher, or the system reports none."""
        highest = self._highest()
        return None if highest is None or self._begun is None or highest == self._peak else highest - self._begun

    def _highest(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform != "linux":
            return None
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class EstimatedMemory(StepMemory):
    """An estimator of the memory of training steps of a model, by a `MemoryModel` that is measured with one job.

    The budget in bytes is `allowed`, or else the share (from `share()`) of the free memory of the model's device.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        job: TrainingJob,
        allowed: int | None,
        *,
        share: Callable[[int | None], int | None],
    ) -> None:
        self._estimate, self._device = MemoryModel.of(model, tokenizer, job), next(model.parameters()).device
        self._is_allowed = allowed is not None
        self.budget = allowed if self._is_allowed else share(step_budget(self._estimate, self._device))

    def peak(self, jobs: Sequence[JobSize]) -> int:
        return self._estimate.peak(jobs)

    def require(self, jobs: Mapping[str, JobSize]) -> None:
        """Raise BudgetExceeded, with the rows that would fit, for a job too large alone; begin to measure memory."""
        limit, way_out = "allowed", "or raise memory_bytes"
        if not self._is_allowed:
            limit = f"free on {self._device}, the base's included"
            way_out = "end other processes that use that memory, or pass memory_bytes to train all the same"
        for name, size in jobs.items():
            if not self.fits([size]):
                fewer = (rows for rows in range(size.num_rows - 1, 0, -1) if self.fits([replace(size, num_rows=rows)]))
                lower = "" if (fitting := next(fewer, None)) is None else f"lower batch_size to {fitting}, "
                raise BudgetExceeded(
                    f"job {name!r} takes about {self.peak([size]) / 1e9:.2f} GB alone ({size.num_rows} rows of up to "
                    f"{size.longest} tokens, the base {self._estimate.weight_bytes / 1e9:.2f} GB), and "
                    f"{(self.budget or 0) / 1e9:.2f} GB are {limit}; {lower}shorten its longest examples, {way_out}"
                )
        self._use = MemoryUse(self._device)

    def measured(self) -> int | None:
        grown = self._use.grown()
        return None if grown is None else self._estimate.weight_bytes + grown
