"""The tokens of a conversation under a cache, and which of them it began with."""

from __future__ import annotations

from torch import Tensor

from loraweave.routers.routing.cached_ids import CachedIds


class SeenTokens(CachedIds):
    """ids_BT of the tokens in a cache; the first `num_first` are those of the call that began it."""

    def __init__(self, ids_BT: Tensor) -> None:
        super().__init__(ids_BT)
        self.num_first = ids_BT.shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.num_first = min(self.num_first, self.get_seq_length())
