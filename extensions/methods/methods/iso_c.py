"""The sum with all its singular values made equal: Iso-C (Marczak et al., ICML 2025, arXiv 2502.04959)."""

from loraweave import Factors
from loraweave.extend import traits
from loraweave.extend.merging import Experts, Weights, empty_update
from loraweave.extensions.methods.methods._core import as_factors, counted, gram_svd, joint, opened


@traits("lossy")
def iso_c(experts: Experts, weights: Weights, *, scale: float = 1.0) -> Factors:
    """Return one layer's scale * mean(sigma) U V^T, where U diag(sigma) V^T is the compact SVD of the sum of w_e D_e.

    The mean runs over the singular values that are not zero (above 2^-18 beside the largest of the experts' own), and only
    their directions are kept: the rank is that of the sum. The released code averages over all min(O, I) singular values and
    writes the mean into null directions too, which makes of LoRAs an update of full rank that acts on inputs no expert has
    seen; here mean(sigma) is larger by min(O, I) / rank. Biases are summed with weights.
    """
    first, bias_O, parts = opened(experts, weights, scale)
    if not parts or not scale:
        return empty_update(first, bias_O)
    experts_S = joint(parts)
    # the sum is u diag(size) v^T; with v = (v r) diag(z) z^T orthonormal, its left part carries all singular values
    right_SQ, z_Q, zh_QS = gram_svd(experts_S.v_IS)
    mix_SQ = experts_S.size_S[:, None] * zh_QS.T * z_Q
    left_QP, sigma_P, vh_PQ = gram_svd(experts_S.u_OS @ mix_SQ)
    keep = counted(sigma_P, beside=float(experts_S.size_S.abs().max()))
    if not keep:
        return empty_update(first, bias_O)
    mean = float(sigma_P[:keep].mean()) * scale
    b_OP = experts_S.u_OS @ (mix_SQ @ (left_QP[:, :keep] * mean))
    return as_factors(first, b_OP, (vh_PQ[:keep] @ right_SQ.T) @ experts_S.v_IS.T, bias_O)
