"""RegMean: the update that comes nearest to each expert on that expert's inputs (Jin et al. 2023, arXiv 2212.09849)."""

from collections.abc import Sequence

from loraweave import Factors
from loraweave.extend import Fraction, traits
from loraweave.extend.merging import Experts, Weights
from loraweave.extensions.statistics.methods._recorded import shares
from loraweave.extensions.statistics.methods._regression import regression
from loraweave.extensions.statistics.saved import LayerStatistics


@traits("shares")
def regmean(
    experts: Experts, weights: Weights, *, statistics: Sequence[LayerStatistics | None], off_diagonal: Fraction = 0.9
) -> Factors:
    """Return one layer's (sum of w_e D_e G_e)(sum of w_e G_e)^-1, of rank sum of R_e (eq. 2 of the paper, on updates).

    G_e = X_e^T X_e / n has its off-diagonal multiplied by `off_diagonal` (0.9 in the paper, 0.95 in fusion_bench), which
    keeps the inverse apart from noise. Updates and whole weights give the same: the base is common. Weights say how much
    each expert's inputs count; only their proportions matter. Inputs that no expert has seen get the weighted mean of the
    updates. Biases are averaged by weight.

    An expert without the layer is a zero update where its statistics have the layer, and no part of the mean otherwise.
    Raises WeightingError for statistics that are missing or do not fit. Unlike `least_squares` it shrinks G and starts from
    the mean, not from the base.
    """
    shares_E = shares(experts, weights, statistics, part="gram_II")
    return regression(shares_E, off_diagonal=off_diagonal, from_mean=True)
