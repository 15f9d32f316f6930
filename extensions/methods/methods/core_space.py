"""Any merge rule in the space that all experts span: Core Space (Panariello et al., NeurIPS 2025, arXiv 2509.17786)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from loraweave import Factors
from loraweave.extend import traits
from loraweave.extend.merging import Experts, Term, Weights, empty_update, terms
from loraweave.extensions.methods.methods._core import (
    as_factors,
    clean,
    core_factors,
    joint,
    scaled_bias,
    shared_basis,
    spectra,
)
from loraweave.extensions.methods.methods._inner import NO_OPTIONS, combined, inner_call, with_biases


@traits("lossy", "by_factors")
def core_space(
    experts: Experts,
    weights: Weights,
    *,
    inner: str = "ties_per_layer",
    inner_options: Mapping[str, Any] = NO_OPTIONS,
    basis: Literal["factors", "updates"] = "factors",
    scale: float = 1.0,
    seeds: Sequence[int] = (),
) -> Factors | None:
    """Return one layer's scale * U merge(M_1, ..., M_E) V^T with M_e = U^T D_e V; U (O, P) and V (I, Q) span all updates.

    `inner` names the method that merges the cores M_e, with the weights and `inner_options` (as `{"density": 0.5}`). Nothing
    is lost: inner="linear" is the weighted sum. A rule that looks at all layers takes this one for all, as released.

    basis="factors" is the published one: U has the left singular vectors of [B_1 | ... | B_E] and V the right ones of the A
    one above the other, largest first; P = min(O, S) and Q = min(I, S), S being the sum of ranks as stored. Where factors
    share directions the cores have rows or columns of zeros, which count for a rule that keeps a fraction of the entries:
    the result depends on how an update is split into A and B. The authors leave out alpha / rank, which is in B here.

    basis="updates" depends on the updates alone: U has the left singular vectors of [D_1 | ... | D_E] and V the right ones
    of the updates one above the other, P and Q their ranks. In both, the largest entry of a vector is positive, and equal
    singular values leave a choice. Rules on singular values (`iso_c`, `wudi` with minimiser="exact", `tsv` with `k`) see no
    basis and give what they give alone.

    The inner rule merges biases as they are. `merge` supplies `seeds` for random rules. Raises WeightingError for an inner
    method on factors or statistics.
    """
    call = inner_call(inner, inner_options, method="core_space")
    terms_E = terms(experts, weights)
    first = terms_E[0].factors
    u_OP, v_IQ, cores = _of_factors(terms_E) if basis == "factors" else _of_updates(terms_E)
    if not u_OP.shape[1] or not v_IQ.shape[1]:
        return empty_update(first, scaled_bias(terms_E, scale))
    placed: list[Factors | None] = [None] * len(experts)
    for term, core in zip(terms_E, cores, strict=True):
        placed[term.place] = core
    merged = combined(call, with_biases(placed, experts), weights, seeds)
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


def _of_updates(found: Sequence[Term]) -> tuple[Tensor, Tensor, list[Factors]]:
    """Return U (O, P), V (I, Q) and each expert's core in the singular vectors of the updates; no cores for zero updates."""
    parts = spectra(found)
    experts_S = joint(parts)
    if not sum(experts_S.ranks):
        return experts_S.u_OS, experts_S.v_IS, []
    u_OP, u_PS = shared_basis(experts_S.u_OS, experts_S.s_S)
    v_IQ, v_QS = shared_basis(experts_S.v_IS, experts_S.s_S)
    coordinates = zip(parts, experts_S.each(u_PS), experts_S.each(v_QS), strict=True)
    return u_OP, v_IQ, [core_factors(spectrum, u_PR, v_QR) for spectrum, u_PR, v_QR in coordinates]


def _of_factors(found: Sequence[Term]) -> tuple[Tensor, Tensor, list[Factors]]:
    """Return U (O, min(O, S)), V (I, min(I, S)) and each expert's core in the singular vectors of the stacked factors."""
    u_OP, b_PS = _left_singular(torch.cat([term.factors.b_OR for term in found], dim=1).double())
    v_IQ, a_QS = _left_singular(torch.cat([term.factors.a_RI for term in found]).double().T)
    ranks = [term.factors.rank for term in found]
    coordinates = zip(b_PS.split_with_sizes(ranks, dim=1), a_QS.split_with_sizes(ranks, dim=1), strict=True)
    cores = [Factors(clean(a_QR).T.float().contiguous(), clean(b_PR).float()) for b_PR, a_QR in coordinates]
    return u_OP, v_IQ, cores


def _left_singular(stack_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Return (basis_NP, stack_PS): min(N, S) left singular vectors, zeros for null ones, and the stack in them.

    No column of the stack is lost however small it is; nothing is left of a stack of zeros.
    """
    size_S = stack_NS.norm(dim=0)
    used_S = size_S > 0
    stack_PS = stack_NS.new_zeros(min(stack_NS.shape), stack_NS.shape[1])
    if not bool(used_S.any()):
        return stack_NS[:, :0], stack_PS[:0]
    basis_NP, direction_PU = shared_basis(stack_NS[:, used_S] / size_S[used_S], size_S[used_S])
    num = basis_NP.shape[1]
    stack_PS[:num, used_S] = direction_PU * size_S[used_S]
    return torch.nn.functional.pad(basis_NP, (0, len(stack_PS) - num)), stack_PS
