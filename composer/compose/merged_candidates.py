"""Candidates whose weights are those of a merge: each written into the base, or a population of sums of factors at once.

A sum of factors has the rank of one expert, however many are in it, so that a population costs little more than the base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from loraweave.composer.compose.examples import EncodedExamples
from loraweave.composer.compose.objectives._row_sums import RowSums
from loraweave.composer.compose.population import Job, row_sums
from loraweave.composer.composer import Composer
from loraweave.composer.model.scoring import in_chunks
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors


class Scored(Protocol):
    """What candidates are scored on, as an ExampleLoss is."""

    engine: Composer
    encoded: EncodedExamples
    merge_method: str

    def deal(self, work: Callable[..., Any], pieces: Sequence[Any]) -> list[Any]:
        """Return work(self, piece) of each piece."""
        ...


def active_candidate(engine: Composer, candidate: MixtureWeights, merge_method: str) -> AbstractContextManager[Any]:
    """Activate a "linear" candidate live; write any other merge into the base until the block ends."""
    if merge_method == "linear":
        return engine.activate(candidate)
    weights = {name: value for name, value in candidate.as_dict().items() if value}
    # without a weight there is nothing to merge
    return engine.fused(weights, method=merge_method) if weights else nullcontext()


def merged_sums(on: Scored, jobs: list[Job], needs: frozenset[str]) -> list[RowSums]:
    """Return the sums that each job needs, from one pass for many if its merge is a sum of factors."""
    on.encoded.prepare()
    mixtures = [job.mixture for job in jobs if job.mixture is not None]
    if on.merge_method == "factor_sum" and can_be_factor_sums(on.engine.bound_pool, mixtures):
        return list(chain.from_iterable(on.deal(partial(_summed, needs), in_chunks(jobs, MAX_CANDIDATES))))
    return on.deal(partial(_written, needs), jobs)


def _written(needs: frozenset[str], on: Scored, job: Job) -> RowSums:
    assert job.mixture is not None
    with active_candidate(on.engine, job.mixture, on.merge_method):
        (sums,) = row_sums(on.engine, on.encoded, [replace(job, mixture=None)], needs)
    return sums


def _summed(needs: frozenset[str], on: Scored, part: Sequence[Job]) -> list[RowSums]:
    """Return the sums for LoraHub's sums of factors, from one pass for many: each candidate is an expert of its own."""
    engine = factor_sums(on.engine, [job.mixture for job in part if job.mixture is not None])
    rows = torch.eye(len(part))[:, None, None, None]
    jobs = [replace(job, mixture=MixtureWeights(row, engine.pool.names)) for row, job in zip(rows, part, strict=True)]
    return row_sums(engine, on.encoded, jobs, needs)


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
