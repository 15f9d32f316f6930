"""What Arrow and its kin read off an update b a without forming it: its strongest direction, and the length of b a x."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loraweave.hub.pool import ExpertPool


def parts(pool: ExpertPool, layer: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(place, a_RI, b_OR) of each expert that has factors in the layer, in float64.

    Raises AdapterUnsupported for experts that need their base layer first (DoRA): Composer.bound_pool has them resolved.
    """
    factors = pool.stacked(layer)
    for place in range(len(pool)):
        mine_S = factors.owner_S == place
        if bool(mine_S.any()):
            yield place, factors.a_SI[mine_S].double(), factors.b_OS[:, mine_S].double()


def core(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """c_RI with |c x| = |b a x| for every x: b = q r with orthonormal q, and c = r a."""
    r_RR: Tensor = torch.linalg.qr(b_OR).R
    return r_RR @ a_RI


def top_direction(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """The top right singular vector v_I of b a, the sign being that of its largest entry; zero where b a is."""
    _, values_R, vectors_RI = torch.linalg.svd(core(a_RI, b_OR), full_matrices=False)
    v_I: Tensor = vectors_RI[0]
    sign = v_I[v_I.abs().argmax()].sign()
    return v_I.mul(sign).mul(values_R[0] > 0)


def power_iteration(a_RI: Tensor, b_OR: Tensor, start_I: Tensor, steps: int) -> Tensor:
    """v_I after `steps` steps v <- a^T (b^T b) (a v), each made a unit vector, in fp32 like PEFT's Arrow.

    Where the two largest singular values are close, this is not the top right singular vector yet.
    """
    a_RI, b_OR = a_RI.float(), b_OR.float()
    gram_RR = b_OR.T @ b_OR
    v_I: Tensor = start_I / (start_I.norm() + 1e-8)
    for _ in range(steps):
        v_I = a_RI.T @ (gram_RR @ (a_RI @ v_I))
        v_I = v_I / (v_I.norm() + 1e-8)
    return v_I
