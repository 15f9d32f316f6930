"""The weighted sum of updates at a limited rank."""

from loraweave.composer.merge.method_call import Experts, TruncatedUpdate, Weights
from loraweave.composer.merge.methods._span import combination, counted
from loraweave.lowrank import algebra
from loraweave.lowrank.algebra import compress_sum


def svd(experts: Experts, weights: Weights, *, rank: int | None = None) -> TruncatedUpdate:
    """Return one layer's sum of w_e D_e in its best approximation at `rank` (Eckart-Young), from the factors alone.

    Without `rank` it is the largest among the experts that count, as in PEFT's `svd`, which before 0.21 applied the LoRA
    scale twice. A rank at or above the sum's own leaves it exact. Both factors carry the root of the singular values. Gains
    and biases are not part of the matrix and sum exactly. An expert without the layer is a zero update.
    """
    updates, values = counted(experts, weights)
    total = sum(update.rank for update in updates)
    limit = max(max(update.rank for update in updates) if rank is None else rank, 1)
    if len(updates) > 1 and limit < total and all(update.bound for update in updates):
        algebra.require_alike(updates)
        cut = compress_sum(updates, values, limit)
        return TruncatedUpdate(cut.factors, total, cut.error, cut.inner_EE)
    factors, error = algebra.compress(combination(updates, values), limit)
    return TruncatedUpdate(factors, total, error)
