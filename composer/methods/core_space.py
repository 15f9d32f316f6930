"""Any merge rule in the space that all experts span: Core Space (Panariello et al., NeurIPS 2025, arXiv 2509.17786)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraweave.composer.methods._core import as_factors, core_factors, joint, nothing, scaled_bias, shared_basis, spectra
from loraweave.composer.methods._inner import NO_OPTIONS, combined, inner_call, with_biases
from loraweave.composer.methods._options import finite
from loraweave.composer.methods._terms import terms
from loraweave.types import Factors


def core_space(
    experts: Sequence[Factors | None],
    weights: Sequence[float],
    *,
    inner: str = "ties_per_layer",
    inner_options: Mapping[str, Any] = NO_OPTIONS,
    scale: float = 1.0,
    seeds: Sequence[int] = (),
) -> Factors | None:
    """One layer's scale * U merge(M_1, ..., M_E) V^T with M_e = U^T D_e V, U (O, P) and V (I, Q) spanning all updates.

    `inner` names the method of the registry that merges the cores M_e, at most (sum of ranks, sum of ranks) each; it gets
    the weights and `inner_options` (as `{"density": 0.5}`). Nothing is lost on the way: inner="linear" is the weighted sum.

    U has the left singular vectors of [D_1 | ... | D_E] and V the right ones of the updates one above the other, largest
    first, without weights and with the entry of largest magnitude positive: a basis that the updates alone determine. The
    authors take the singular vectors of the stacked B and of the stacked A, and leave out alpha / rank; theirs span the
    same spaces, but an elementwise rule sees another basis, one that changes when an update is split into A and B otherwise.
    Singular values that are equal leave a choice of basis here too. Rules on singular values (`tsv`, `iso_c`, `wudi`) see
    no basis and give what they give without this. A rule that looks at all layers takes this one for all.

    Biases are merged by the inner rule as they are. `seeds` come from `merge`, for random rules. Raises WeightingError for
    options out of range or an inner method on factors or statistics, LayerMismatch and AdapterUnsupported for updates that
    do not fit, and what the inner method raises.
    """
    call = inner_call(inner, inner_options, method="core_space")
    finite(scale, "scale", method="core_space")
    found = terms(experts, weights, method="core_space")
    if not found:
        return None
    first = found[0].factors
    parts = spectra(found)
    if not any(each.rank for each in parts):
        return nothing(first, scaled_bias(found, scale))
    experts_S = joint(parts)
    u_OP, u_PS = shared_basis(experts_S.u_OS, experts_S.s_S)
    v_IQ, v_QS = shared_basis(experts_S.v_IS, experts_S.s_S)
    cores: list[Factors | None] = [None] * len(experts)
    coordinates = zip(parts, experts_S.each(u_PS), experts_S.each(v_QS), strict=True)
    for each, u_PR, v_QR in coordinates:
        cores[each.place] = core_factors(each, u_PR, v_QR)
    merged = combined(call, with_biases(cores, experts), weights, seeds, method="core_space")
    if merged is None:
        return None
    bias_O = None if merged.bias_O is None else merged.bias_O * scale
    if isinstance(merged, Factors):
        return as_factors(first, u_OP @ (merged.b_OR.double() * scale), merged.a_RI.double() @ v_IQ.T, bias_O)
    rows_P, columns_Q = merged.delta_OI.any(dim=1), merged.delta_OI.any(dim=0)
    core_PQ = merged.delta_OI[rows_P][:, columns_Q].double() * scale
    u_OP, v_IQ = u_OP[:, rows_P], v_IQ[:, columns_Q]
    if core_PQ.shape[0] <= core_PQ.shape[1]:
        return as_factors(first, u_OP, core_PQ @ v_IQ.T, bias_O)
    return as_factors(first, u_OP @ core_PQ, v_IQ.T, bias_O)
