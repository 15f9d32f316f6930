"""Per-row mixtures as batched products: each row meets its own experts' factors only, not those of the whole batch.

Equals `kernels.naive` with the rank rows of weight zero left out. The rows' factors are gathered once per activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.composer.kernels.naive import naive

# bounds by judgement: gathering was measured at 1/8 and 1/4 of the rank rows, with copies of once and twice the factors
LARGEST_SHARE = 0.5
LARGEST_COPY = 4


@dataclass(frozen=True, eq=False)
class Gathered:
    """The factors of B mixtures, each with its own R rank rows, filled up with rank rows of weight zero."""

    a_BRI: Tensor
    b_BRO: Tensor
    w_B1R: Tensor


def gather(a_SI: Tensor, b_OS: Tensor, w_BTS: Tensor) -> Gathered | None:
    """The rows' own factors; None where weights vary by token or are shared, or where the rows use most of the factors."""
    num_rows, num_tokens, num_ranks = w_BTS.shape
    if num_rows < 2 or num_tokens != 1:
        return None
    used_BS = w_BTS[:, 0] != 0
    own = int(used_BS.sum(dim=1).max())
    if own == 0 or own > LARGEST_SHARE * num_ranks or num_rows * own > LARGEST_COPY * num_ranks:
        return None
    # stable, so that a row's experts stay in the order of the pool
    place_BR = used_BS.int().argsort(dim=1, descending=True, stable=True)[:, :own]
    return Gathered(
        a_BRI=a_SI[place_BR],
        b_BRO=b_OS.T[place_BR].contiguous(),
        w_B1R=w_BTS[:, 0].gather(1, place_BR)[:, None],
    )


def gathered(x_BTI: Tensor, a_SI: Tensor, b_OS: Tensor, w_BTS: Tensor) -> Tensor:
    """The same as `naive`, by each row's own factors where that pays."""
    own = gather(a_SI, b_OS, w_BTS)
    return naive(x_BTI, a_SI, b_OS, w_BTS) if own is None else multiplied(x_BTI, own)


def multiplied(x_BTI: Tensor, rows: Gathered) -> Tensor:
    """The weighted updates as (B, T, O); x may have k rows on end for each mixture. Dtypes as in `naive`."""
    num_mixtures, _, num_inputs = rows.a_BRI.shape
    # not -1, which is ambiguous for an input without tokens
    tokens = x_BTI.shape[0] * x_BTI.shape[1] // num_mixtures
    hidden_BTR = torch.bmm(x_BTI.reshape(num_mixtures, tokens, num_inputs), rows.a_BRI.mT)
    mixed_BTR = hidden_BTR.to(torch.promote_types(hidden_BTR.dtype, torch.float32)) * rows.w_B1R
    mixed_BTR = mixed_BTR.masked_fill(rows.w_B1R == 0, 0.0)
    update_BTO = torch.bmm(mixed_BTR.to(hidden_BTR.dtype), rows.b_BRO)
    return update_BTO.view(*x_BTI.shape[:2], rows.b_BRO.shape[2])
