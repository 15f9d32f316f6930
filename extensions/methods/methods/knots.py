"""Merging in a column space that all experts share: KnOTS (Stoica et al., ICLR 2025, arXiv 2410.19735)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from loraweave import Factors
from loraweave.extend import traits
from loraweave.extend.merging import DenseUpdate, Experts, Term, Weights, empty_update, surveys, terms
from loraweave.extensions.methods.methods._core import as_factors, core_factors, joint, scaled_bias, shared_basis, spectra
from loraweave.extensions.methods.methods._inner import NO_OPTIONS, combined, inner_call, with_biases


def needs_survey(*, inner: str = "ties", inner_options: Mapping[str, Any] = NO_OPTIONS) -> bool:
    """Return True if the inner rule looks at all layers, so that `survey` must run first."""
    return inner_call(inner, inner_options, method="knots").survey is not None


def survey(
    layers: Iterable[Experts], weights: Weights, *, inner: str = "ties", inner_options: Mapping[str, Any] = NO_OPTIONS
) -> Any:
    """Return the inner rule's survey of the pieces of all layers, which it needs before it merges the first layer."""
    survey_of = inner_call(inner, inner_options, method="knots").survey
    assert survey_of is not None, "`needs_survey` asks before"
    layer_terms = ((experts, terms(experts, weights)) for experts in layers)
    return survey_of(
        (_pieces(experts, kept)[1] if kept else [None] * len(experts) for experts, kept in layer_terms), weights
    )


@surveys(survey, where=needs_survey)
@traits("lossy")
def knots(
    experts: Experts,
    weights: Weights,
    *,
    inner: str = "ties",
    inner_options: Mapping[str, Any] = NO_OPTIONS,
    scale: float = 1.0,
    seeds: Sequence[int] = (),
    survey: Any = None,
) -> Factors | None:
    """Return one layer's scale * U merge(S V_1^T, ..., S V_E^T), where [D_1 | ... | D_E] = U S [V_1^T | ... | V_E^T].

    `inner` names the method that merges the pieces S V_e^T = U^T D_e, each (P, I) with P the dimension of the joint column
    space, with the weights and `inner_options` (as `{"density": 0.5}`). By default TIES as published, which trims the pieces
    of all layers together; "ties_per_layer" trims layer by layer. U is that of the updates without weights, with all
    directions that any expert has. A linear rule is unchanged: inner="linear" is the weighted sum itself.

    The pieces keep their singular values, as in the authors' code. The KnOTS in Core Space's released code merges V_e^T
    alone, layer by layer, and multiplies by S afterwards, which differs for every rule that compares entries. Directions of
    equal singular values have no unique basis, and an elementwise rule sees the one chosen.

    The inner rule merges biases as they are. `merge` supplies `seeds`, and `survey`, what the inner rule has seen of all
    layers' pieces; without a survey this layer is all of them. WeightingError for an inner method on factors or statistics.
    """
    call = inner_call(inner, inner_options, method="knots")
    terms_E = terms(experts, weights)
    first = terms_E[0].factors
    u_OP, pieces = _pieces(experts, terms_E)
    if not u_OP.shape[1]:
        return empty_update(first, scaled_bias(terms_E, scale))
    merged = combined(call, pieces, weights, seeds, survey=survey)
    if merged is None:
        return None
    bias_O = None if merged.bias_O is None else merged.bias_O * scale
    if isinstance(merged, DenseUpdate):
        rows = merged.delta_OI.any(dim=1)
        return as_factors(first, u_OP[:, rows], merged.delta_OI[rows] * scale, bias_O)
    return as_factors(first, u_OP @ (merged.b_OR.double() * scale), merged.a_RI.clone(), bias_O)


def _pieces(experts: Experts, found: Sequence[Term]) -> tuple[Tensor, list[Factors | None]]:
    """Return U (O, P) and for each expert U^T D_e with its bias.

    An expert with weight 0 or without the layer has None; if every update is zero, all have None.
    """
    pieces: list[Factors | None] = [None] * len(experts)
    parts = spectra(found)
    experts_S = joint(parts)
    if not sum(experts_S.ranks):
        return experts_S.u_OS, pieces
    u_OP, u_PS = shared_basis(experts_S.u_OS, experts_S.s_S)
    for spectrum, u_PR in zip(parts, experts_S.each(u_PS), strict=True):
        pieces[spectrum.place] = core_factors(spectrum, u_PR)
    return u_OP, with_biases(pieces, experts)
