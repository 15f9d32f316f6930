"""The nuclear norm of members' factors: a measure of how different their directions are."""

import torch
from torch import Tensor


def nuclear_norm(a_SI: Tensor) -> Tensor:
    """Return the sum of the singular values of all members' factors, stacked and each row scaled to norm 1.

    To be maximised (Zhai et al. 2024, arXiv 2401.00243): S, the number of rows, where they are orthogonal, which takes S <=
    I, and sqrt(S) where they all lie along one line. The order of rows does not matter. A row of zeros counts as nothing.
    """
    length_S1 = a_SI.norm(dim=1, keepdim=True)
    used_SI = a_SI / torch.where(length_S1 > 0, length_S1, 1)
    values_S: Tensor = torch.linalg.svdvals(used_SI.to(torch.promote_types(used_SI.dtype, torch.float32)))
    return values_S.sum()
