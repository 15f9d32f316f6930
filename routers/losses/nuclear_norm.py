"""How different the directions of members' factors are."""

from __future__ import annotations

import torch
from torch import Tensor


def nuclear_norm(a_SI: Tensor) -> Tensor:
    """The sum of the singular values of all members' factors over each other, each row made 1 long (Zhai et al. 2024,
    arXiv 2401.00243), to be maximised.

    S, the number of rows, where they are orthogonal, which takes S <= I, and sqrt(S) where they all lie along one line. It
    does not depend on the order of rows. A row of zeros counts as nothing.
    """
    length_S1 = a_SI.norm(dim=1, keepdim=True)
    used_SI = a_SI / torch.where(length_S1 > 0, length_S1, 1)
    values_S: Tensor = torch.linalg.svdvals(used_SI.to(torch.promote_types(used_SI.dtype, torch.float32)))
    return values_S.sum()
