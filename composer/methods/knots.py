"""Merging in a column space that all experts share: KnOTS (Stoica et al., ICLR 2025, arXiv 2410.19735)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraweave.composer.dense_update import DenseUpdate
from loraweave.composer.methods._core import as_factors, core_factors, joint, nothing, scaled_bias, shared_basis, spectra
from loraweave.composer.methods._inner import NO_OPTIONS, combined, inner_call, with_biases
from loraweave.composer.methods._options import finite
from loraweave.composer.methods._terms import terms
from loraweave.types import Factors


def knots(
    experts: Sequence[Factors | None],
    weights: Sequence[float],
    *,
    inner: str = "ties_per_layer",
    inner_options: Mapping[str, Any] = NO_OPTIONS,
    scale: float = 1.0,
    seeds: Sequence[int] = (),
) -> Factors | None:
    """One layer's scale * U merge(S V_1^T, ..., S V_E^T), where [D_1 | ... | D_E] = U S [V_1^T | ... | V_E^T].

    `inner` names the method of the registry that merges the pieces S V_e^T = U^T D_e, each (P, I) with P the dimension of
    the joint column space; it gets the weights and `inner_options` (as `{"density": 0.5}`). By default TIES, trimmed per
    layer, the mean of those that agree. U is that of the updates without weights, with all directions that any expert has.
    For a rule that is linear KnOTS changes nothing: inner="linear" is the weighted sum itself.

    The pieces keep their singular values, as in the authors' code, whose TIES trims over all layers at once. The KnOTS in
    Core Space's released code merges V_e^T alone and multiplies by S afterwards, which differs for every rule that compares
    entries. A rule that looks at all layers takes this one for all. Directions of equal singular values have no unique
    basis, and an elementwise rule sees the one chosen.

    Biases are merged by the inner rule as they are. `seeds` come from `merge`, for random rules. Raises WeightingError for
    options out of range or an inner method on factors or statistics, LayerMismatch and AdapterUnsupported for updates that
    do not fit, and what the inner method raises.
    """
    call = inner_call(inner, inner_options, method="knots")
    finite(scale, "scale", method="knots")
    found = terms(experts, weights, method="knots")
    if not found:
        return None
    first = found[0].factors
    parts = spectra(found)
    if not any(each.rank for each in parts):
        return nothing(first, scaled_bias(found, scale))
    experts_S = joint(parts)
    u_OP, u_PS = shared_basis(experts_S.u_OS, experts_S.s_S)
    pieces: list[Factors | None] = [None] * len(experts)
    for each, u_PR in zip(parts, experts_S.each(u_PS), strict=True):
        pieces[each.place] = core_factors(each, u_PR)
    merged = combined(call, with_biases(pieces, experts), weights, seeds, method="knots")
    if merged is None:
        return None
    bias_O = None if merged.bias_O is None else merged.bias_O * scale
    if isinstance(merged, DenseUpdate):
        rows = merged.delta_OI.any(dim=1)
        return as_factors(first, u_OP[:, rows], merged.delta_OI[rows] * scale, bias_O)
    return as_factors(first, u_OP @ (merged.b_OR.double() * scale), merged.a_RI.clone(), bias_O)
