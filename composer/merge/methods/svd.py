"""The weighted sum of updates at a limited rank."""

from __future__ import annotations

from collections.abc import Sequence

from loraweave.composer.merge.methods._span import combination, counted
from loraweave.composer.merge.updates import TruncatedUpdate
from loraweave.errors import WeightingError
from loraweave.lowrank import algebra
from loraweave.lowrank.truncation import compress_sum
from loraweave.types import Factors


def svd(experts: Sequence[Factors | None], weights: Sequence[float], *, rank: int | None = None) -> TruncatedUpdate | None:
    """The best approximation of one layer's sum of w_e D_e at `rank` (Eckart-Young), from the factors alone.

    `rank` is at least 1; None takes the largest rank among the experts that count, as PEFT's `svd` does. A rank at or
    above the sum's own leaves it exact. Both factors carry the root of the singular values. Gains and biases are no part
    of the matrix and sum exactly. An expert without the layer is a zero update.

    Raises WeightingError for a rank below 1, LayerMismatch and AdapterUnsupported as `linear` does. PEFT before 0.21
    applied the LoRA scale twice here.
    """
    if rank is not None and rank < 1:
        raise WeightingError(f"svd: rank={rank} is below 1")
    updates, values = counted(experts, weights)
    if not updates:
        return None
    total = sum(update.rank for update in updates)
    limit = max(max(update.rank for update in updates) if rank is None else rank, 1)
    if len(updates) > 1 and limit < total and all(update.bound for update in updates):
        algebra.require_alike(updates)
        cut = compress_sum(updates, values, limit)
        return TruncatedUpdate(cut.factors, total, cut.error, cut.inner_EE)
    factors, error = algebra.compress(combination(updates, values), limit)
    return TruncatedUpdate(factors, total, error)
