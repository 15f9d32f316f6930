"""Output directions that many experts share, weakened before merging: Pico (Tang and Yang 2026, arXiv 2604.16826)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loraweave import Factors
from loraweave.extend import algebra
from loraweave.extend.merging import DenseUpdate, Experts, Weights, empty_update, terms, weighted_bias
from loraweave.extensions.methods.methods._core import NULL, as_factors, core_factors, gram_svd, joint, spectra
from loraweave.extensions.methods.methods._inner import NO_OPTIONS, combined, inner_call, with_biases


def pico(
    experts: Experts,
    weights: Weights,
    *,
    inner: str = "linear",
    inner_options: Mapping[str, Any] = NO_OPTIONS,
    rescale: bool = True,
    seeds: Sequence[int] = (),
) -> Factors | DenseUpdate | None:
    """Return one layer's gamma * merge(C D_1, ..., C D_E), where C turns down output directions that the experts share.

    With U diag(sigma) the left singular vectors and values of [B_1 | ... | B_E] and s_j = sigma_j^2 / sum of sigma^2, the
    share of direction j, C = 1 + U diag(alpha - 1) U^T with alpha_j = 1 / (1 + (E - 1) s_j). `inner` names the method that
    merges, with the weights and `inner_options`. gamma brings the Frobenius norm of the result to the mean of |w_e| |D_e|
    (`rescale`=False: 1), the paper's mean norm of the sources for weights of 1; a single expert of weight w gives w D. The
    formulas are those of the authors' code.

    Our reading: the authors take B as trained, which depends on how an update is split. Here B_e = U_e S_e, the B that an
    update has when the rows of its A are orthonormal, as those of a LoRA nearly are from their random start; so U and sigma
    are those of [D_1 | ... | D_E]. E is the number of updates that are not zero. Weights have no part in C. Should the
    experts cancel each other (to 2^-18), the rest is rounding and gamma is 1.

    The inner rule merges biases as they are. `merge` supplies `seeds` for random rules. Raises WeightingError for an inner
    method on factors or statistics.
    """
    call = inner_call(inner, inner_options, method="pico")
    terms_E = terms(experts, weights)
    first = terms_E[0].factors
    parts = spectra(terms_E)
    num = sum(spectrum.rank > 0 for spectrum in parts)
    if not num:
        return empty_update(first, weighted_bias(terms_E))
    experts_S = joint(parts)
    stack_OS = experts_S.u_OS * experts_S.s_S
    t_SP, sigma_P, _ = gram_svd(stack_OS)
    u_OP = stack_OS @ t_SP
    share_P = sigma_P.square() / sigma_P.square().sum()
    change_P = 1.0 / (1.0 + (num - 1) * share_P) - 1.0
    turned_OS = experts_S.u_OS + u_OP @ (change_P[:, None] * (u_OP.T @ experts_S.u_OS))
    calibrated: list[Factors | None] = [None] * len(experts)
    for spectrum, u_OR in zip(parts, experts_S.each(turned_OS), strict=True):
        core = core_factors(replace(spectrum, u_OR=u_OR))
        calibrated[spectrum.place] = replace(core, kind=first.kind, kernel=first.kernel)
    merged = combined(call, with_biases(calibrated, experts), weights, seeds)
    if merged is None:
        return None
    aim = sum(abs(spectrum.weight) * spectrum.norm for spectrum in parts) / num

    def gamma(size: float) -> float:
        return aim / size if rescale and size > NULL * aim else 1.0

    if isinstance(merged, DenseUpdate):
        return replace(merged, delta_OI=merged.delta_OI * gamma(float(merged.delta_OI.double().norm())))
    b_OR = merged.b_OR.double() * gamma(algebra.norm(merged))
    return as_factors(merged, b_OR, merged.a_RI.clone(), merged.bias_O)
