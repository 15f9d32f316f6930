"""The scoring of candidates on examples: as many as fit in one pass, a mixture a row, with or without a backward pass.

A candidate whose weights are those of another merge method is written into the base; only a population of sums of factors
runs at once. A sum of factors has the rank of one expert, however many are in it, so that a population costs little more
than the base.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

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


@dataclass(frozen=True, eq=False)
class Job:
    """The scoring of a mixture (None: the base model) on some examples, given by index.

    A large job is split into several; `whole` has the examples of the job before it was split.
    """

    mixture: MixtureWeights | None
    examples: tuple[int, ...]
    whole: tuple[int, ...]


def in_passes(encoded: EncodedExamples, jobs: Sequence[Job], *, backward: bool = False) -> tuple[list[list[Job]], list[int]]:
    """Split jobs into parts and group them into forward passes; return the passes, and the number of parts of each job.

    Parts keep the order of their jobs. They share a pass if one activation can serve them and their tokens and logits fit;
    with `backward`, a pass holds fewer tokens.
    """
    max_tokens = MAX_TOKENS_WITH_GRADIENTS if backward else MAX_TOKENS
    encoded.prepare()
    passes: list[list[Job]] = []
    counts, longest, shared = [], (0, 0), None
    for job in jobs:
        # runs of consecutive examples that each fit into one pass, where possible
        tokens, logits = encoded.size(job.examples)
        num_examples = len(job.examples)
        count = min(num_examples, max(math.ceil(tokens / max_tokens), math.ceil(logits / MAX_LOGITS)))
        size = math.ceil(num_examples / count)
        starts = range(0, num_examples, size)
        counts.append(len(starts))
        for start in starts:
            part = replace(job, examples=job.examples[start : start + size])
            tokens, logits = encoded.size(part.examples)
            mixture, largest = part.mixture, (max(longest[0], tokens), max(longest[1], logits))
            key = bool(encoded.trees_of(part.examples)), None if mixture is None else (mixture.experts, mixture.layers)
            rows = len(passes[-1]) + 1 if passes else 1
            if passes and key == shared and largest[0] * rows <= max_tokens and largest[1] * rows <= MAX_LOGITS:
                passes[-1].append(part)
                longest = largest
            else:
                passes.append([part])
                longest, shared = (tokens, logits), key
    return passes, counts


def joined(sums: Iterable[Sequence[RowSums]], counts: Sequence[int]) -> list[RowSums]:
    """Join the sums of the parts in all passes into one RowSums for each job; job j has counts[j] parts."""
    in_order = chain.from_iterable(sums)
    return [RowSums.join(list(islice(in_order, count))) for count in counts]


def row_sums(engine: Composer, encoded: EncodedExamples, jobs: Sequence[Job], needs: frozenset[str]) -> list[RowSums]:
    """Return each job's sums of the names in `needs`, in the order of the jobs; without gradients."""
    passes, counts = in_passes(encoded, jobs)
    with untouched(engine.model), torch.no_grad():
        return joined([forward_sums(engine, encoded, part, needs) for part in passes], counts)


def task_values(jobs: Sequence[Job]) -> Tensor:
    """Return values_CTLE, the weights of C jobs that have a mixture. Raises ScopeError if any vary by row or token."""
    mixtures = [job.mixture for job in jobs if job.mixture is not None]
    for mixture in mixtures:
        if mixture.scope != "task":
            raise ScopeError(
                f"a candidate has one mixture for all examples, but this one has values of shape "
                f"{tuple(mixture.values_BTLE.shape)} (B, T, L, E), of scope {mixture.scope}; give B and T the size 1"
            )
    return torch.cat([mixture.values_BTLE for mixture in mixtures])


def forward_sums(
    engine: Composer, encoded: EncodedExamples, jobs: Sequence[Job], needs: frozenset[str], values_CTLE: Tensor | None = None
) -> list[RowSums]:
    """Return each job's sums from one forward pass; `values_CTLE`, if given, replace the jobs' weights and get gradients."""
    batch = encoded.batch([job.examples for job in jobs])
    first = jobs[0].mixture
    with ExitStack() as stack:
        if first is not None:
            values = task_values(jobs) if values_CTLE is None else values_CTLE
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
        places, num_targets = list(job.examples), encoded.num_targets(job.whole)
        job_sums.append(RowSums(encoded.count_NR[places], encoded.right_N[places], num_targets, sums_by_name))
    return job_sums


def _sums(logits_BPV: Tensor, batch: JobBatch, needs: frozenset[str]) -> dict[str, Tensor]:
    """Return {name in `needs`: sum over the target tokens of each real text row}, in order."""
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


def active_candidate(engine: Composer, candidate: MixtureWeights, merge_method: str) -> AbstractContextManager[Any]:
    """Activate a "linear" candidate live; write any other merge into the base until the block ends."""
    if merge_method == "linear":
        return engine.activate(candidate)
    weights = {name: value for name, value in candidate.as_dict().items() if value}
    # without a weight there is nothing to merge
    return engine.fused(weights, method=merge_method) if weights else nullcontext()


def can_be_factor_sums(pool: ExpertPool, mixtures: Sequence[MixtureWeights]) -> bool:
    """Return True if all mixtures are sums of the same experts, factor by factor, with one weight for each expert.

    If not, each mixture is merged by its method, which raises the reason, or leaves out experts of weight 0.
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
    """Return the sum over p of w_cp part_p, for each of C mixtures, as a tensor (C, shape of a part)."""
    return (w_CP @ torch.stack(list(parts)).float().flatten(1)).view(len(w_CP), *parts[0].shape)
