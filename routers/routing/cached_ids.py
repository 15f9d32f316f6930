"""The token ids that a cache has seen, for routers that read the text so far."""

from __future__ import annotations

import torch
from torch import Tensor


class CachedIds:
    """ids_BT of the tokens in a cache, beside it (`BesideCache[CachedIds]`)."""

    def __init__(self, ids_BT: Tensor) -> None:
        self.ids_BT = ids_BT

    def append(self, ids_BT: Tensor) -> None:
        self.ids_BT = torch.cat([self.ids_BT, ids_BT], dim=1)

    def get_seq_length(self) -> int:
        return self.ids_BT.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.ids_BT = self.ids_BT.index_select(0, beam_idx.to(self.ids_BT.device))

    def crop(self, tokens_to_remove: int) -> None:
        self.ids_BT = self.ids_BT[:, : self.get_seq_length() - abs(tokens_to_remove)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.ids_BT = self.ids_BT.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.ids_BT = self.ids_BT[indices]

    def reset(self) -> None:
        self.ids_BT = self.ids_BT[:, :0]
