"""The scoring of candidates on examples: as many as fit in one pass, a mixture a row, with or without a backward pass.

A sum of factors has the rank of one expert, however many are in it, so that a population costs little more than the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Self

import torch
from torch import Tensor

from loraweave.composer.compose.examples import EncodedExamples, JobBatch
from loraweave.composer.compose.objectives._row_sums import ENTROPY, LOSS, MISS, RowSums
from loraweave.composer.composer import Composer
from loraweave.composer.model.batches import IGNORED, untouched
from loraweave.errors import ScopeError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

# the logits over the vocabulary, and the tokens with hidden values, that one forward pass holds at most
MAX_LOGITS = 768
MAX_TOKENS = 8192
# a backward pass keeps the hidden values of every layer
MAX_TOKENS_WITH_GRADIENTS = 1024


# the loss of each job from its sums
Losses = Callable[[list[RowSums]], list[Tensor]]


@dataclass(frozen=True, eq=False)
class Job:
    """One candidate, to be scored on some examples by index; without a mixture, the model as it is.

    A part of a job has the `num_targets` of the whole.
    """

    mixture: MixtureWeights | None
    examples: tuple[int, ...]
    num_targets: int | None = None


@dataclass(frozen=True, eq=False)
class Passes:
    """The forward passes that jobs take: each has some parts of jobs, all in order; job j has parts_of_job[j] of them."""

    each: list[list[Job]]
    parts_of_job: list[int]

    @classmethod
    def of(cls, encoded: EncodedExamples, jobs: Sequence[Job], *, backward: bool = False) -> Self:
        """Return the passes of all jobs; `backward` ones hold fewer tokens."""
        max_tokens = MAX_TOKENS_WITH_GRADIENTS if backward else MAX_TOKENS
        encoded.prepare()
        pieces = [_pieces(encoded, job, max_tokens) for job in jobs]
        return cls(
            list(_passes(encoded, [piece for job_pieces in pieces for piece in job_pieces], max_tokens)),
            list(map(len, pieces)),
        )

    def joined(self, found: Iterable[Sequence[RowSums]]) -> list[RowSums]:
        """Return the sums of each job, in the order of the jobs, from those of each pass."""
        in_order = chain.from_iterable(found)
        return [RowSums.join(list(islice(in_order, count))) for count in self.parts_of_job]


def row_sums(engine: Composer, encoded: EncodedExamples, jobs: Sequence[Job], needs: frozenset[str]) -> list[RowSums]:
    """Return the sums that each job needs, in the order of the jobs; without gradients."""
    passes = Passes.of(encoded, jobs)
    return passes.joined([pass_sums(engine, encoded, part, needs) for part in passes.each])


def pass_sums(engine: Composer, encoded: EncodedExamples, part: Sequence[Job], needs: frozenset[str]) -> list[RowSums]:
    """Return the sums that each job of one pass needs."""
    encoded.prepare()
    with untouched(engine.model), torch.no_grad():
        return _forward(engine, encoded, part, needs)


def pass_slopes(
    engine: Composer, encoded: EncodedExamples, part: Sequence[Job], needs: frozenset[str], losses: Losses
) -> tuple[list[float], Tensor]:
    """Return the loss of each of C jobs of one pass, and their slopes by values_CTLE; both in fp32 or better.

    `losses` returns the loss of each job from the sums of all. A loss must depend on the job's own values alone.
    """
    encoded.prepare()
    with ExitStack() as stack:
        stack.enter_context(untouched(engine.model))
        # below a caller's inference_mode, tensors would take no part in a backward pass
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        values_CTLE = _values(part).detach().clone()
        values_CTLE = values_CTLE.to(torch.promote_types(values_CTLE.dtype, torch.float32)).requires_grad_()
        job_losses = losses(_forward(engine, encoded, part, needs, values_CTLE))
        (slopes_CTLE,) = torch.autograd.grad(torch.stack(job_losses).sum(), values_CTLE)
    return [float(loss.detach()) for loss in job_losses], slopes_CTLE


def _pieces(encoded: EncodedExamples, job: Job, max_tokens: int) -> list[Job]:
    """Return the job split into runs of consecutive examples that each fit into one pass, where possible."""
    tokens, logits = encoded.size(job.examples)
    count = min(len(job.examples), max(math.ceil(tokens / max_tokens), math.ceil(logits / MAX_LOGITS)))
    size = math.ceil(len(job.examples) / count)
    num_targets = encoded.num_targets(job.examples)
    return [
        replace(job, examples=job.examples[start : start + size], num_targets=num_targets)
        for start in range(0, len(job.examples), size)
    ]


def _passes(encoded: EncodedExamples, jobs: Sequence[Job], max_tokens: int) -> Iterator[list[Job]]:
    """Yield the jobs in order, in groups that can share a batch and fit into one pass; at least one job each."""
    part: list[Job] = []
    longest = (0, 0)
    for job in jobs:
        tokens, logits = encoded.size(job.examples)
        size = max(longest[0], tokens), max(longest[1], logits)
        fits = size[0] * (len(part) + 1) <= max_tokens and size[1] * (len(part) + 1) <= MAX_LOGITS
        if part and not (fits and _shared_key(encoded, part[0]) == _shared_key(encoded, job)):
            yield part
            part, size = [], (tokens, logits)
        part.append(job)
        longest = size
    if part:
        yield part


def _shared_key(encoded: EncodedExamples, job: Job) -> Any:
    """Return a key that is the same for jobs that one batch can hold under one activation."""
    mixture = job.mixture
    return encoded.has_trees(job.examples), None if mixture is None else (mixture.experts, mixture.layers)


def _values(jobs: Sequence[Job]) -> Tensor:
    """Return values_CTLE of jobs that have a mixture. Raises ScopeError for one that varies by row or token."""
    mixtures = [job.mixture for job in jobs if job.mixture is not None]
    for mixture in mixtures:
        if mixture.scope != "task":
            raise ScopeError(
                f"a candidate has one mixture for all examples, but this one has values of shape "
                f"{tuple(mixture.values_BTLE.shape)} (B, T, L, E), of scope {mixture.scope}; give B and T the size 1"
            )
    return torch.cat([mixture.values_BTLE for mixture in mixtures])


def _forward(
    engine: Composer, encoded: EncodedExamples, jobs: Sequence[Job], needs: frozenset[str], values_CTLE: Tensor | None = None
) -> list[RowSums]:
    """Return each job's sums from one forward pass; `values_CTLE` are the jobs' own where gradients are to reach them."""
    batch = encoded.batch([job.examples for job in jobs])
    first = jobs[0].mixture
    with ExitStack() as stack:
        if first is not None:
            values = _values(jobs) if values_CTLE is None else values_CTLE
            if len(set(batch.rows_of_job)) > 1:
                values = values.repeat_interleave(torch.tensor(batch.rows_of_job, device=values.device), dim=0)
            # job c owns rows c * k to (c + 1) * k, the order in which live mixing expands rows
            stack.enter_context(engine.activate(MixtureWeights(values, first.experts, first.layers)))
        sums = _sums(batch.logits(engine.model), batch, needs)
    job_sums, start = [], 0
    for job in jobs:
        end = start + len(job.examples)
        sums_by_name = {name: sum_M.view(-1, encoded.num_texts)[start:end].cpu() for name, sum_M in sums.items()}
        start = end
        num_targets = encoded.num_targets(job.examples) if job.num_targets is None else job.num_targets
        job_sums.append(
            RowSums(encoded.counts(job.examples), encoded.right_N[list(job.examples)], num_targets, sums_by_name)
        )
    return job_sums


def _sums(logits_BPV: Tensor, batch: JobBatch, needs: frozenset[str]) -> dict[str, Tensor]:
    """Return sums over the target tokens of each real text row, in order."""
    num_rows, num_kept, num_words = logits_BPV.shape
    start_B11 = num_kept * torch.arange(1, num_rows + 1, device=logits_BPV.device)[:, None, None]
    place_BRK = start_B11 + batch.slot_BRK
    known_BRK = batch.target_BRK != IGNORED
    target_BRK = batch.target_BRK.clamp(min=0)
    logits_NV = logits_BPV.reshape(-1, num_words)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    values = {}
    if LOSS in needs:
        values[LOSS] = logits_NV.logsumexp(dim=1)[place_BRK] - logits_NV[place_BRK, target_BRK]
    if MISS in needs:
        values[MISS] = (logits_NV.argmax(dim=1)[place_BRK] != target_BRK).to(logits_NV.dtype)
    if ENTROPY in needs:
        logs_NV = logits_NV.log_softmax(dim=1)
        values[ENTROPY] = -(logs_NV.exp() * logs_NV).sum(dim=1)[place_BRK]
    return {name: torch.where(known_BRK, value_BRK, 0.0).sum(dim=2)[batch.real_BR] for name, value_BRK in values.items()}


# factor sums that are made at a time, since each has as many bytes as an adapter
MAX_CANDIDATES = 16


def can_be_factor_sums(pool: ExpertPool, mixtures: Sequence[MixtureWeights]) -> bool:
    """Return whether all experts can be summed factor by factor, under mixtures of one weight for each of the same experts.

    Where not, the merge method itself says why, or leaves out the experts of weight 0 that keep it from being so.
    """
    first = mixtures[0]
    if not set(first.experts) <= set(pool.names):
        return False
    if any(mixture.scope != "task" or mixture.layers or mixture.experts != first.experts for mixture in mixtures):
        return False
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    for adapter in pool.subset(first.experts).adapters.values():
        for layer, factors in adapter.layers.items():
            factor_shapes = factors.a_RI.shape, factors.b_OR.shape
            if factors.gain_O is not None or not factors.bound or shapes.setdefault(layer, factor_shapes) != factor_shapes:
                return False
    return True


def factor_sums(engine: Composer, mixtures: Sequence[MixtureWeights]) -> Composer:
    """Return a Composer with an expert "0", "1", ... for each mixture: a = sum of w_e a_e, b = sum of w_e b_e, by layer."""
    pool = engine.bound_pool.subset(mixtures[0].experts)
    w_CE = torch.cat([mixture.values_BTLE for mixture in mixtures])[:, 0, 0].float()
    layers: list[dict[str, Factors]] = [{} for _ in mixtures]
    for layer in pool.layer_names:
        members = enumerate(pool.adapters.values())
        factors_by_place = {place: adapter.layers[layer] for place, adapter in members if layer in adapter.layers}
        w_CP = w_CE[:, list(factors_by_place)]
        a_CRI = _factor_sums(w_CP, [factors.a_RI for factors in factors_by_place.values()])
        b_COR = _factor_sums(w_CP, [factors.b_OR for factors in factors_by_place.values()])
        first = next(iter(factors_by_place.values()))
        bias_CO = None
        if any(factors.bias_O is not None for factors in factors_by_place.values()):
            zeros_O = torch.zeros(first.b_OR.shape[0])
            bias_CO = _factor_sums(
                w_CP, [zeros_O if factors.bias_O is None else factors.bias_O for factors in factors_by_place.values()]
            )
        for number, sums_by_layer in enumerate(layers):
            bias_O = None if bias_CO is None else bias_CO[number]
            sums_by_layer[layer] = replace(first, a_RI=a_CRI[number], b_OR=b_COR[number], bias_O=bias_O)
    first_adapter = next(iter(pool.adapters.values()))
    made = {
        str(number): replace(first_adapter, name=str(number), layers=sums_by_layer)
        for number, sums_by_layer in enumerate(layers)
    }
    return Composer(engine.model, ExpertPool(made))


def _factor_sums(w_CP: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Return the sum over p of w_cp part_p, for each c."""
    return (w_CP @ torch.stack(list(parts)).float().flatten(1)).view(len(w_CP), *parts[0].shape)
