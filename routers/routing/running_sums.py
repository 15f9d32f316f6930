"""What each layer of a conversation has summed up so far, for routers that decide by the tokens up to the present one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class RunningSums:
    """For the tokens in a cache, beside it (`BesideCache[RunningSums]`): which are real, real_BT, and each layer's sums_BTE.

    Token t's sum is over the real tokens up to t, so that tokens can be taken back. A layer that a call did not reach has
    fewer tokens than the others.
    """

    def __init__(self, real_BT: Tensor) -> None:
        self.real_BT = real_BT
        self.sums: dict[str, Tensor] = {}

    def last(self) -> dict[str, Tensor]:
        """{layer: sum_B1E over all tokens}, of the layers that have seen them all."""
        num_tokens = self.get_seq_length()
        return {layer: s_BTE[:, -1:] for layer, s_BTE in self.sums.items() if num_tokens and s_BTE.shape[1] == num_tokens}

    def append(self, real_BT: Tensor) -> None:
        self.real_BT = torch.cat([self.real_BT, real_BT.to(self.real_BT.device)], dim=1)

    def put(self, layer: str, sums_BTE: Tensor) -> None:
        """The sums of the last T tokens."""
        num_before, known_BTE = self.get_seq_length() - sums_BTE.shape[1], self.sums.get(layer)
        new_BTE = sums_BTE.detach()
        self.sums[layer] = new_BTE if known_BTE is None else torch.cat([known_BTE[:, :num_before], new_BTE], dim=1)

    def get_seq_length(self) -> int:
        return self.real_BT.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def crop(self, tokens_to_remove: int) -> None:
        num_left = self.get_seq_length() - abs(tokens_to_remove)
        self._change(lambda tensor: tensor[:, :num_left])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        self._change(lambda tensor: tensor[:, :0])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.real_BT = change(self.real_BT)
        self.sums = {layer: change(s_BTE) for layer, s_BTE in self.sums.items()}
