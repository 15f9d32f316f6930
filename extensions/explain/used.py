"""The load of each expert: its share of the weights that a forward used, and the entropy of a token's weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave import ScopeError
from loraweave.extend.live import UsedLayer, UsedWeights

# the number of weights that are converted to float64 at once
CHUNK = 2**20


@dataclass(frozen=True, eq=False)
class Load:
    """The load of each expert of one layer, over `num_tokens` tokens of all rows.

    `share_E` is each expert's share of the tokens' absolute weight (sums to 1; all 0 where no token has weight), `chosen_E`
    the share of tokens whose weight for the expert is not 0. `entropy` is in nats: 0 where every token has one expert,
    ln E where it has all alike; the mean over the tokens that have weight, NaN where none has.
    """

    share_E: Tensor
    chosen_E: Tensor
    entropy: float
    num_tokens: int


def load_of(w_BTE: Tensor, mask_BT: Tensor | None = None) -> Load:
    """Return the load of each expert: its share of a layer's weights (float64), padding (`mask_BT` 0) left out.

    Axes B and T of size 1 are shared by all rows and tokens of the mask. Raises ScopeError where the two do not fit.
    """
    if mask_BT is not None:
        w_BTE = UsedLayer(w_BTE, *mask_BT.shape).spread_BTE
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
    """Return entropy_N of |w| normalised over the last axis, in nats and float64; NaN where all weights are 0."""
    magnitude_NE = w_NE.detach().double().abs()
    total_N = magnitude_NE.sum(dim=-1)
    share_NE = magnitude_NE / total_N[..., None]
    # abs: one expert alone would give -0
    entropy_N = torch.xlogy(share_NE, share_NE).sum(dim=-1).abs()
    return torch.where(total_N > 0, entropy_N, torch.nan)


def loads(used: UsedWeights, attention_mask: Tensor | None = None) -> dict[str, Load]:
    """Return {layer: load of its experts} of used weights; with the call's attention mask, padding is left out.

    Raises ScopeError for the mask of another batch.
    """
    return {
        name: load_of(layer.spread_BTE, None if attention_mask is None else _mask_of(layer, attention_mask))
        for name, layer in used.layers.items()
    }


def _mask_of(used: UsedLayer, attention_mask: Tensor) -> Tensor:
    """Return the attention mask for the rows and tokens of a layer's call: the last tokens, if the mask includes a cache.

    A layer called with all tokens as rows of a matrix gets the mask in that form. Raises ScopeError for another batch's.
    """
    if attention_mask.numel() == used.num_rows * used.num_tokens:
        return attention_mask.reshape(used.num_rows, used.num_tokens)
    rows, tokens = attention_mask.shape
    if used.num_rows % rows != 0 or tokens < used.num_tokens:
        raise ScopeError(
            f"an attention mask of {rows} rows and {tokens} tokens does not fit a forward of {used.num_rows} rows and "
            f"{used.num_tokens} tokens; give the mask of that call"
        )
    return attention_mask[:, tokens - used.num_tokens :].repeat_interleave(used.num_rows // rows, dim=0)
