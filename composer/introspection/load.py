"""How weights share the tokens out among the experts: each expert's load, and the entropy of a token's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.errors import ScopeError

# weights that are looked at in one piece
CHUNK = 2**20


@dataclass(frozen=True, eq=False)
class Load:
    """What the experts of one layer carry, over `num_tokens` tokens of all rows.

    `share_E` is each expert's share of the tokens' absolute weight (sums to 1; all 0 where no token has weight), `chosen_E`
    the share of tokens whose weight for the expert is not 0. `entropy` is in nats: 0 where every token has one expert,
    ln E where it has all alike; the mean over the tokens that have weight, NaN where none has.
    """

    share_E: Tensor
    chosen_E: Tensor
    entropy: float
    num_tokens: int


def load(w_BTE: Tensor, mask_BT: Tensor | None = None) -> Load:
    """The load of weights of one layer, in float64. Tokens where `mask_BT` is 0 (padding) are left out.

    Axes B and T of size 1 are shared by all rows and tokens of the mask. Raises ScopeError where the two do not fit.
    """
    if mask_BT is not None:
        w_BTE = spread(w_BTE, *mask_BT.shape)
    w_NE = w_BTE.detach().flatten(0, 1)
    if mask_BT is not None:
        w_NE = w_NE[mask_BT.flatten().to(w_NE.device) != 0]
    total_E, chosen_E = torch.zeros(2, w_NE.shape[1], dtype=torch.float64, device=w_NE.device)
    entropies_N = []
    for part_NE in torch.split(w_NE, max(1, CHUNK // max(w_NE.shape[1], 1))):
        total_E += part_NE.double().abs().sum(dim=0)
        chosen_E += (part_NE != 0).sum(dim=0)
        entropies_N.append(entropies(part_NE))
    total = total_E.sum()
    return Load(
        share_E=total_E / total if total > 0 else total_E,
        chosen_E=chosen_E / max(len(w_NE), 1),
        entropy=float(torch.cat(entropies_N).nanmean()),
        num_tokens=len(w_NE),
    )


def entropies(w_NE: Tensor) -> Tensor:
    """entropy_N of |w| normalised over the last axis, in nats and float64; NaN where all weights are 0."""
    magnitude_NE = w_NE.detach().double().abs()
    total_N = magnitude_NE.sum(dim=-1)
    share_NE = magnitude_NE / total_N[..., None]
    # abs: one expert alone would give -0
    entropy_N = torch.xlogy(share_NE, share_NE).sum(dim=-1).abs()
    return torch.where(total_N > 0, entropy_N, torch.nan)


def spread(w_BTE: Tensor, num_rows: int, num_tokens: int) -> Tensor:
    """The weights for so many rows and tokens: a size of 1 is shared, B rows serve k B rows, each k of them on end.

    Raises ScopeError where that does not come out even.
    """
    rows, tokens, _ = w_BTE.shape
    if tokens not in (1, num_tokens) or num_rows % rows != 0:
        raise ScopeError(
            f"weights of {rows} rows and {tokens} tokens do not fit a batch or mask of {num_rows} rows and {num_tokens} "
            "tokens; give the mask of the call that used them"
        )
    if rows not in (1, num_rows):
        w_BTE = w_BTE.repeat_interleave(num_rows // rows, dim=0)
    return w_BTE.expand(num_rows, num_tokens, -1)
