"""The mean of updates weighted by Fisher information, entry by entry (Matena and Raffel 2022, arXiv 2111.09832)."""

from collections.abc import Sequence

import torch

from loraweave import WeightingError
from loraweave.extend import NonNegative, traits
from loraweave.extend.merging import DenseUpdate, Experts, Weights
from loraweave.extensions.statistics.methods._recorded import Share, share_bias, shares
from loraweave.extensions.statistics.saved import LayerStatistics

# rows of the update that are held in float64 at once
BLOCK_ROWS = 256


@traits("shares")
def fisher(
    experts: Experts,
    weights: Weights,
    *,
    statistics: Sequence[LayerStatistics | None],
    floor: NonNegative = 1e-6,
    normalise: bool = False,
) -> DenseUpdate:
    """Return one layer's sum of w_e F_e * D_e / sum of w_e F_e, entry by entry, where F_e = max(F_e, floor) (paper's eq. 3).

    Only proportions of the weights count. `floor` is in units of F: where every F_e lies below it the result is the weighted
    mean, so it should be small against the F of the model. `normalise` divides w_e by the norm of F_e over all layers of its
    adapter, so that a confident expert does not outweigh the others everywhere: F_e is floored first and divided afterwards,
    as in the authors' code. Biases, whose Fisher is not recorded, are averaged by weight.

    An expert without the layer is a zero update where its statistics have the layer, and no part of the mean otherwise.
    Raises WeightingError for statistics that are missing or do not fit, and for a norm of zero with `normalise`. The
    authors' code floors F of the first model alone unless told otherwise; fusion_bench adds its minimal weight to F.
    """
    shares_E = shares(experts, weights, statistics, part="fisher_OI")
    first = next(share.term for share in shares_E if share.term is not None).factors
    num_out, num_in = first.b_OR.shape[0], first.a_RI.shape[1]
    total = sum(share.weight for share in shares_E)
    factors = [share.weight / total for share in shares_E]
    if normalise:
        factors = [factor / _norm(share) for factor, share in zip(factors, shares_E, strict=True)]
    delta_OI = torch.empty(num_out, num_in)
    for start in range(0, num_out, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        block = delta_OI[rows].shape
        above_OI, below_OI, mean_OI = (torch.zeros(block, dtype=torch.float64) for _ in range(3))
        for share, weight in zip(shares_E, factors, strict=True):
            assert share.seen.fisher_OI is not None
            weight_OI = share.seen.fisher_OI[rows].double().clamp_(min=floor).mul_(weight)
            below_OI += weight_OI
            if share.term is not None:
                update_OI = share.term.factors.b_OR[rows].double() @ share.term.factors.a_RI.double()
                above_OI += weight_OI.mul_(update_OI)
                mean_OI += update_OI.mul_(share.weight / total)
        # without a floor, all Fisher values of an entry may be 0
        delta_OI[rows] = torch.where(below_OI > 0, above_OI / below_OI, mean_OI)
    return DenseUpdate(delta_OI, share_bias(shares_E), first.kind, first.kernel)


def _norm(share: Share) -> float:
    """Return the Frobenius norm of the expert's Fisher, over all layers if that is recorded, else of this one.

    Raises WeightingError for 0.
    """
    seen = share.seen
    assert seen.fisher_OI is not None
    norm = float(seen.fisher_OI.double().norm()) if seen.fisher_norm is None else seen.fisher_norm
    if norm == 0.0:
        raise WeightingError(
            "fisher: normalise=True divides by the norm of each expert's Fisher, and that of one is 0: its texts gave no "
            "gradient anywhere; collect it again with other texts, or leave normalise out"
        )
    return norm
