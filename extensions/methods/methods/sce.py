"""SCE merging (FuseChat, Wan et al. 2024, arXiv 2408.07990): select, calculate, erase."""

from collections.abc import Iterator

import torch
from torch import Tensor

from loraweave.extend import Fraction
from loraweave.extend.merging import Cut, DenseUpdate, Entries, Experts, Weights, decide, divisor, largest, merged, terms


def sce(experts: Experts, weights: Weights, *, density: Fraction = 0.1, scale: float = 1.0) -> DenseUpdate:
    """Return one layer's SCE merge of the updates t_e = w_e delta_e; weights of one are the paper.

    1. Select: keep the entries at which the variance over experts is among the int(density * n) largest, n being the
       number of entries at which it is not zero; of equal ones the earlier. Where it is zero everywhere (one expert, or
       experts that are the same) there is nothing to choose by, and every entry is kept.
    2. Calculate: c_e = |t_e|^2 / sum of |t_f|^2, over the kept entries.
    3. Erase: gamma = sign of the sum of t_e, 1 where that is zero; entries of the other sign are left out. The result is
       scale * (sum of c_e t_e) / (sum of c_e), both over the experts with sign gamma.

    `density` is mergekit's select_topk; 1 selects everything. Since the result is an average, two equal experts of weight
    one half give half of one. Experts without the layer take no part; matrix and bias have coefficients of their own. fp32
    products, float64 variances, votes and norms. mergekit's `sce` has no weights, and takes equal coefficients once the mean
    squares are below 1e-6, which those of a LoRA often are.
    """

    def rule(entries: Entries, out_OI: Tensor) -> None:
        cut = _select(entries, density, out_OI)
        squares_E = torch.zeros(len(entries), dtype=torch.float64)
        for _, kept_EN in _selected(entries, cut):
            squares_E += kept_EN.double().square_().sum(dim=1)
        total = float(squares_E.sum())
        coefficients_E = (squares_E / total if total > 0.0 else squares_E).float()
        for rows, kept_EN in _selected(entries, cut):
            sign_N = decide(kept_EN.sum(dim=0, dtype=torch.float64), 1.0)
            agreeing_EN = kept_EN.mul_(sign_N).relu_()
            result_N = (coefficients_E @ agreeing_EN).mul_(sign_N)
            result_N.div_(divisor(coefficients_E @ agreeing_EN.sign_())).mul_(scale)
            out_OI[rows] = result_N.view(-1, entries.shape[1])

    return merged(terms(experts, weights), rule)


def _select(entries: Entries, density: float, scratch_OI: Tensor) -> Cut | None:
    """Return the cut, on the standard deviations, that selects the entries of largest variance; None selects everything."""
    if density == 1.0:
        return None
    varying = sum(int(torch.count_nonzero(deviation_BI)) for _, deviation_BI in _deviations(entries))
    return largest(lambda: _deviations(entries), int(density * varying), scratch_OI) if varying else None


def _deviations(entries: Entries) -> Iterator[tuple[slice, Tensor]]:
    for rows, t_EBI in _weigh(entries):
        yield rows, _deviation(t_EBI)


def _selected(entries: Entries, cut: Cut | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks (E, N) of the updates t_e at the selected entries, zero elsewhere."""
    for rows, t_EBI in _weigh(entries):
        if cut is not None:
            selected_BI = _deviation(t_EBI)
            cut.apply(rows, selected_BI, selected_BI)
            t_EBI.mul_(selected_BI.sign_())
        yield rows, t_EBI.reshape(len(entries), -1)


def _weigh(entries: Entries) -> Iterator[tuple[slice, Tensor]]:
    weights_E11 = torch.tensor(entries.weights)[:, None, None]
    for rows, stack_EBI in entries.stacks():
        yield rows, stack_EBI.mul_(weights_E11)


def _deviation(t_EBI: Tensor) -> Tensor:
    """Return the standard deviation over experts (B, I): in the order of the variance, and safe from underflow.

    float64, because the mean of equal fp32 numbers must be that number.
    """
    exact_EBI = t_EBI.double()
    exact_EBI -= exact_EBI.mean(dim=0)
    return exact_EBI.square_().mean(dim=0).sqrt_().float()
