"""ACE-Merging (Xu et al., CVPR 2026, arXiv 2603.02945): a regression on inputs guessed from the updates."""

import torch
from torch import Tensor

from loraweave import Factors
from loraweave.extend import Positive, Share, traits
from loraweave.extend.merging import Experts, Weights, empty_update
from loraweave.extensions.methods.methods._core import as_factors, counted, opened

# log traces that vary by more than this share of their squared mean are of experts of very different size
UNEVEN = 0.3
TINY = 1e-12


@traits("lossy")
def ace(experts: Experts, weights: Weights, *, eps: Positive = 1e-2, k_fraction: Share = 0.3) -> Factors:
    """Return one layer's T = (sum of C_e G_e)(sum of G_e + 1 c^T)^-1, with a spectral part where sizes differ much.

    D_e is w_e times the update, C_e is D_e less its mean row, S_e = C_e^T C_e the estimate of the expert's input covariance,
    G_e = S_e + eps I, and c the mean row of the sum of S_e, which enters every row alike. With t_e = tr(D_e^T D_e), sizes
    differ much where var(log t) > 0.3 mean(log t)^2. Then S_e and eps are divided by tr(S_e), c by the mean of t, and
    U_k V_k^T * mean(sigma_k) is added, of the `k_fraction` * min(O, I) largest singular triplets of

        T + sum of D_e (S_e - mean of G)

    As in the released code, whose settings are the defaults. All of it lies in the experts' row space, so that nothing is
    inverted beyond the sum of their ranks. Null directions, which the released code fills at random where an update is of
    low rank, are left out, and mean(sigma_k) is over the others. Weights scale updates, and their size counts: eps is in
    units of squared weights. Biases are summed with weights.
    """
    first, bias_O, parts = opened(experts, weights)
    if not parts:
        return empty_update(first, bias_O)
    # D_e = d_e basis and C_e = c_e basis, in an orthonormal basis of the common row space
    left_IS, size_S, _ = torch.linalg.svd(torch.cat([spectrum.v_IR for spectrum in parts], dim=1), full_matrices=False)
    basis_PI = left_IS[:, : counted(size_S)].T
    updates = [(spectrum.u_OR * (spectrum.s_R * spectrum.weight)) @ (spectrum.v_IR.T @ basis_PI.T) for spectrum in parts]
    centred = [d_OP - d_OP.mean(dim=0, keepdim=True) for d_OP in updates]
    covariances = [c_OP.T @ c_OP for c_OP in centred]
    trace_E = torch.tensor(
        [float((spectrum.weight * spectrum.s_R).square().sum()) for spectrum in parts], dtype=torch.float64
    )
    log_E = (trace_E + TINY).log()
    uneven = len(parts) > 1 and bool(log_E.var() / (log_E.mean().square() + TINY) > UNEVEN)
    size_E = [float(s_PP.trace()) + TINY if uneven else 1.0 for s_PP in covariances]
    covariances = [s_PP / size for s_PP, size in zip(covariances, size_E, strict=True)]
    eye_PP = torch.eye(len(basis_PI), dtype=torch.float64)
    damped = [s_PP + eps / size * eye_PP for s_PP, size in zip(covariances, size_E, strict=True)]
    total_PP = torch.stack(damped).sum(dim=0)
    ones_P = basis_PI.sum(dim=1)
    mean_row_P = (torch.stack(covariances).sum(dim=0) @ ones_P) / basis_PI.shape[1]
    if uneven:
        mean_row_P = mean_row_P / (float(trace_E.mean()) + TINY)
    target_OP = torch.stack([c_OP @ g_PP for c_OP, g_PP in zip(centred, damped, strict=True)]).sum(dim=0)
    merged_OP = torch.linalg.solve(total_PP + torch.outer(ones_P, mean_row_P), target_OP, left=False)
    if uneven:
        mean_PP = total_PP / len(parts)
        rest = [d_OP @ (s_PP - mean_PP) for d_OP, s_PP in zip(updates, covariances, strict=True)]
        merged_OP = merged_OP + _level(merged_OP + torch.stack(rest).sum(dim=0), k_fraction, basis_PI.shape[1])
    left_OP, r_PP = torch.linalg.qr(merged_OP)
    return as_factors(first, left_OP, r_PP @ basis_PI, bias_O)


def _level(fused_OP: Tensor, k_fraction: float, num_inputs: int) -> Tensor:
    """Return mean(sigma_k) U_k V_k^T of the top `k_fraction` * min(O, `num_inputs`) singular triplets, without null ones."""
    u_OS, s_S, vh_SP = torch.linalg.svd(fused_OP, full_matrices=False)
    kept = min(int(min(fused_OP.shape[0], num_inputs) * k_fraction), counted(s_S))
    return (u_OS[:, :kept] * s_S[:kept].mean()) @ vh_SP[:kept] if kept else torch.zeros_like(fused_OP)
