"""What is wrong with the numbers that a merge is given, found before any method sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch

from loraweave.common.options import fits
from loraweave.composer.merge.updates import DenseUpdate, TruncatedUpdate, without_figures
from loraweave.errors import CompositionError, WeightingError
from loraweave.lowrank.algebra import all_finite
from loraweave.types import Factors

# the largest entry of a weighted update: 256 of them still sum to what fp32 holds, 2^128
LARGEST = 2.0**120

# entries of an update that are formed at once, in float64
BLOCK = 2**20


def finite_weights(weights: Any, names: Sequence[str]) -> list[float]:
    """One finite number for each of the named adapters. Raises WeightingError for anything else."""
    # a set has no order, and would lose equal weights
    unordered = isinstance(weights, str | bytes | Mapping | Set) or not hasattr(weights, "__len__")
    if unordered or getattr(weights, "ndim", 1) != 1:
        raise WeightingError(
            f"weights={weights!r:.80} is no list of numbers; give one for each of {len(names)} adapters, in their order"
        )
    if len(weights) != len(names):
        raise WeightingError(f"merge got {len(names)} adapters and {len(weights)} weights; it takes one weight for each")
    return [_number(name, weight) for name, weight in zip(names, weights, strict=True)]


def require_seed(seed: object) -> None:
    """Raises WeightingError for a seed that is no whole number."""
    if not fits(seed, int):
        raise WeightingError(
            f"seed={seed!r:.80} is no whole number; give one, such as 0, and the same one for the same result"
        )


def require_sound(layer: str, experts: Mapping[str, Factors | None], weights: Sequence[float], method: str) -> None:
    """Raises CompositionError for values of an expert that are NaN or infinite, or that its weight takes beyond fp32.

    Each factor is read once, for its norm; only where the product of norms is beyond 2^120 is the update itself looked at.
    """
    for (name, factors), weight in zip(experts.items(), weights, strict=True):
        if factors is None or weight == 0.0:
            continue
        bound = _norm_product(factors)
        if part := _unsound_part(factors, bound):
            tensor = factors.tensors()[part]
            num = int((~torch.isfinite(tensor)).sum())
            raise CompositionError(
                f"{num} of {tensor.numel()} values in {part} of adapter {name!r} are NaN or infinite in layer "
                f"{layer!r}; leave the adapter out, or read it again"
            )
        if (largest := _largest(factors, bound, LARGEST / abs(weight))) * abs(weight) > LARGEST:
            raise CompositionError(
                f"method {method!r} could give values that are NaN or infinite for layer {layer!r}: the update of "
                f"{name!r} is up to {largest:.3g}, its weight is {weight:.3g}, and the product may be {LARGEST:.3g} at "
                "most; use a smaller weight"
            )


def holds(update: Factors | DenseUpdate | TruncatedUpdate) -> bool:
    """Whether a result is finite: its tensors, and the product of its factors in fp32."""
    held = without_figures(update)
    if isinstance(held, DenseUpdate):
        return all_finite(held.delta_OI) and (held.bias_O is None or all_finite(held.bias_O))
    limit = torch.finfo(torch.float32).max
    bound = _norm_product(held)
    return _unsound_part(held, bound) is None and _largest(held, bound, limit) <= limit


def _number(name: str, weight: Any) -> float:
    try:
        value = math.nan if isinstance(weight, str | bytes) else float(weight)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        value = math.nan
    if not math.isfinite(value):
        raise WeightingError(f"the weight of adapter {name!r} is {weight!r:.80}; weights must be finite numbers")
    return value


def _unsound_part(factors: Factors, bound: float) -> str | None:
    """The first part with a value that is NaN or infinite; None where all are finite, as they are if `bound` is."""
    sound = ("a_RI", "b_OR") if math.isfinite(bound) else ()
    return next((part for part, each in factors.tensors().items() if part not in sound and not all_finite(each)), None)


def _norm_product(factors: Factors) -> float:
    """|B| * |A|, which no entry of the update exceeds in magnitude."""
    return float(torch.linalg.vector_norm(factors.b_OR.detach())) * float(torch.linalg.vector_norm(factors.a_RI.detach()))


def _largest(factors: Factors, bound: float, enough: float) -> float:
    """The largest magnitude of the update and its bias; a bound of it where that is not above `enough`."""
    bias = 0.0 if factors.bias_O is None else float(factors.bias_O.detach().abs().max())
    if max(bound, bias) <= enough or not factors.rank:
        return max(bound, bias)
    step = max(1, BLOCK // factors.a_RI.shape[1])
    a_RI, b_OR = factors.a_RI.detach().double(), factors.b_OR.detach().double()
    return max(bias, *(float((b_OR[row : row + step] @ a_RI).abs().max()) for row in range(0, len(b_OR), step)))
