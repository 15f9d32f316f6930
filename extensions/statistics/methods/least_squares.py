"""Mix-of-Show's gradient fusion in closed form: least squares on the experts' inputs (Gu et al. 2023, arXiv 2305.18292)."""

from collections.abc import Sequence

from loraweave import Factors
from loraweave.extend import traits
from loraweave.extend.merging import Experts, Weights
from loraweave.extensions.statistics.methods._recorded import shares
from loraweave.extensions.statistics.methods._regression import regression
from loraweave.extensions.statistics.saved import LayerStatistics


@traits("shares")
def least_squares(experts: Experts, weights: Weights, *, statistics: Sequence[LayerStatistics | None]) -> Factors:
    """Return one layer's smallest D that minimises sum of w_e |(D - D_e) X_e|^2 / n_e, of rank sum of R_e.

    D = (sum of w_e D_e G_e)(sum of w_e G_e)^+: of several minima the one nearest to the base model, where the authors'
    L-BFGS starts. Inputs that no expert has seen therefore get the base; directions whose share of the inputs is below the
    rounding of fp32 count as not seen. Weights say how much each expert's inputs count; the authors' alpha, which scales an
    update before it is fused, is `scale`. Biases, which the authors leave out, are averaged by weight.

    An expert without the layer is a zero update where its statistics have the layer, and no part of the mean otherwise.
    Raises WeightingError for statistics that are missing or do not fit. Nothing is shrunk, unlike in `regmean`, so that the
    loss is never above that of any other merge.
    """
    shares_E = shares(experts, weights, statistics, part="gram_II")
    return regression(shares_E, off_diagonal=1.0, from_mean=False)
