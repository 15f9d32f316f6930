"""Task singular vectors, merged without interference: TSV-M (Gargiulo et al., CVPR 2025, arXiv 2412.00081)."""

from __future__ import annotations

from collections.abc import Sequence

from loraweave.common.checks import is_whole
from loraweave.composer.merge.methods._core import (
    Spectrum,
    as_factors,
    assemble,
    gram_svd,
    joint,
    nothing,
    scaled_bias,
    spectra,
)
from loraweave.composer.merge.methods._options import finite
from loraweave.composer.merge.methods._terms import terms
from loraweave.errors import WeightingError
from loraweave.types import Factors


def tsv(
    experts: Sequence[Factors | None], weights: Sequence[float], *, k: int | None = None, scale: float = 1.0
) -> Factors | None:
    """One layer's scale * U* diag(s) V*^T: the top singular vectors of all experts, made orthonormal together.

    Of each update w_e D_e the min(k, rank) largest singular triplets are kept; [U_1 | ... | U_E] and [V_1 | ... | V_E] are
    replaced by their polar factors, the nearest matrices with orthonormal columns. `k`, 1 or more, is min(O, I) // E by
    default as in the released code, E being the experts whose update of this layer is not zero: the stacks have no more
    columns than the layer has dimensions. k=min(O, I) keeps everything. Weights multiply singular values. A single expert
    comes back as it is, and experts that share no direction are summed; what they share is shared out: two equal updates of
    weight w/2 give D w/2.

    The polar factors are taken within the range of the stacks, so that inputs that no expert sees stay unseen: the released
    code keeps its k triplets whatever the rank, and with low-rank updates whitens directions that are zero. More experts
    than dimensions keep one triplet each, where the released code keeps none. Biases are summed with weights. The result
    has at most the sum of ranks. Raises WeightingError for options out of range, LayerMismatch and AdapterUnsupported for
    updates that do not fit.
    """
    if k is not None and not is_whole(k, 1):
        raise WeightingError(
            f"tsv: k={k!r} is below 1, the fewest singular vectors to keep of each expert; leave it out for min(O, I) // E"
        )
    finite(scale, "scale", method="tsv")
    found = terms(experts, weights, method="tsv")
    if not found:
        return None
    first, bias_O = found[0].factors, scaled_bias(found, scale)
    parts = spectra(found)
    if k is None:
        k = max(1, min(first.b_OR.shape[0], first.a_RI.shape[1]) // max(1, sum(each.rank > 0 for each in parts)))
    kept = joint([_top(each, k) for each in parts])
    if not sum(kept.ranks) or not scale:
        return nothing(first, bias_O)
    # the polar factor of a stack X with thin SVD (X t) diag(s) vh is (X t) vh
    left_SP, _, left_PS = gram_svd(kept.u_OS)
    right_SQ, _, right_QS = gram_svd(kept.v_IS)
    core_PQ = (left_PS * (kept.size_S * scale)) @ right_QS.T
    if core_PQ.shape == (sum(kept.ranks),) * 2:
        # full rank: nothing can cancel
        return as_factors(first, kept.u_OS @ left_SP, (core_PQ @ right_SQ.T) @ kept.v_IS.T, bias_O)
    floor = 1e-12 * float(kept.size_S.abs().max()) * abs(scale)
    return assemble(first, kept.u_OS @ left_SP, core_PQ, kept.v_IS @ right_SQ, bias_O, floor)


def _top(parts: Spectrum, k: int) -> Spectrum:
    return Spectrum(parts.u_OR[:, :k], parts.s_R[:k], parts.v_IR[:, :k], parts.weight, parts.place)
