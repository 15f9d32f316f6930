"""Candidates that mix the experts' a and b apart, as LoraHub does, side by side in one model: as experts of their own.

A sum of factors has the rank of one expert, however many are in it, so that a population costs little more than the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loraweave.composer.composer import Composer
from loraweave.hub.pool import ExpertPool
from loraweave.routers.mixture import MixtureWeights
from loraweave.types import Factors

# at a time, since each has as many bytes as an adapter
MAX_CANDIDATES = 16


def can_be_factor_sums(pool: ExpertPool, mixtures: Sequence[MixtureWeights]) -> bool:
    """Whether all experts can be summed factor by factor, and each mixture is one weight for each of the same experts.

    Where not, the merge method itself says why, or leaves out the experts of weight 0 that keep it from being so.
    """
    first = mixtures[0]
    if not set(first.experts) <= set(pool.names):
        return False
    if any(each.scope != "task" or each.layers or each.experts != first.experts for each in mixtures):
        return False
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    for adapter in pool.subset(first.experts).adapters.values():
        for layer, factors in adapter.layers.items():
            own = factors.a_RI.shape, factors.b_OR.shape
            if factors.gain_O is not None or not factors.bound or shapes.setdefault(layer, own) != own:
                return False
    return True


def factor_sums(engine: Composer, mixtures: Sequence[MixtureWeights]) -> Composer:
    """A Composer with an expert "0", "1", ... for each mixture: a = sum of w_e a_e, b = sum of w_e b_e, in every layer."""
    pool = engine.bound_pool.subset(mixtures[0].experts)
    w_CE = torch.cat([each.values_BTLE for each in mixtures])[:, 0, 0].float()
    layers: list[dict[str, Factors]] = [{} for _ in mixtures]
    for layer in pool.layer_names:
        own = {
            place: adapter.layers[layer] for place, adapter in enumerate(pool.adapters.values()) if layer in adapter.layers
        }
        w_CP = w_CE[:, list(own)]
        a_CRI = _sums(w_CP, [factors.a_RI for factors in own.values()])
        b_COR = _sums(w_CP, [factors.b_OR for factors in own.values()])
        bias_CO = _biases(w_CP, list(own.values()))
        first = next(iter(own.values()))
        for number, found in enumerate(layers):
            bias_O = None if bias_CO is None else bias_CO[number]
            found[layer] = replace(first, a_RI=a_CRI[number], b_OR=b_COR[number], bias_O=bias_O)
    first_adapter = next(iter(pool.adapters.values()))
    made = {str(number): replace(first_adapter, name=str(number), layers=found) for number, found in enumerate(layers)}
    return Composer(engine.model, ExpertPool(made))


def _sums(w_CP: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """sum over p of w_cp part_p, for each c."""
    return (w_CP @ torch.stack(list(parts)).float().flatten(1)).view(len(w_CP), *parts[0].shape)


def _biases(w_CP: Tensor, factors: Sequence[Factors]) -> Tensor | None:
    if all(each.bias_O is None for each in factors):
        return None
    zeros_O = torch.zeros(factors[0].b_OR.shape[0])
    return _sums(w_CP, [zeros_O if each.bias_O is None else each.bias_O for each in factors])
