"""Task singular vectors, merged without interference: TSV-M (Gargiulo et al., CVPR 2025, arXiv 2412.00081)."""

from dataclasses import replace

from loraweave import Factors
from loraweave.extend import Count
from loraweave.extend.merging import Experts, Weights, empty_update
from loraweave.extensions.methods.methods._core import assemble, gram_svd, joint, opened


def tsv(experts: Experts, weights: Weights, *, k: Count | None = None, scale: float = 1.0) -> Factors:
    """Return one layer's scale * U* diag(s) V*^T: the top singular vectors of all experts, made orthonormal together.

    Of each update w_e D_e the min(k, rank) largest singular triplets are kept; [U_1 | ... | U_E] and [V_1 | ... | V_E] are
    replaced by their polar factors, the nearest matrices with orthonormal columns. `k` is by default min(O, I) // E as in
    the released code, E being the experts whose update of this layer is not zero: the stacks then have no more columns than
    the layer has dimensions. k=min(O, I) keeps everything. Weights multiply singular values. A single expert comes back as
    it is, and experts that share no direction are summed; two equal updates of weight w/2 give D w/2.

    The polar factors are taken within the range of the stacks, so that inputs that no expert sees stay unseen: the released
    code keeps its k triplets whatever the rank, and with low-rank updates whitens directions that are zero. More experts
    than dimensions keep one triplet each, where the released code keeps none. Biases are summed with weights. The result has
    at most the sum of ranks.
    """
    first, bias_O, parts = opened(experts, weights, scale)
    if not parts or not scale:
        return empty_update(first, bias_O)
    if k is None:
        k = max(1, min(first.b_OR.shape[0], first.a_RI.shape[1]) // len(parts))
    kept = joint(
        [replace(spectrum, u_OR=spectrum.u_OR[:, :k], s_R=spectrum.s_R[:k], v_IR=spectrum.v_IR[:, :k]) for spectrum in parts]
    )
    # the polar factor of a stack X with thin SVD (X t) diag(s) vh is (X t) vh
    left_SP, _, left_PS = gram_svd(kept.u_OS)
    right_SQ, _, right_QS = gram_svd(kept.v_IS)
    core_PQ = (left_PS * (kept.size_S * scale)) @ right_QS.T
    return assemble(first, kept, core_PQ, (left_SP, right_SQ), bias_O, num=sum(kept.ranks), scale=scale)
