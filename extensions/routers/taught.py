"""The scores of rows whose own expert is known, from which gates learn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loraweave.extend import InputGates, Step


def taught(router: InputGates, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each layer's (scores_NE, expert_N) of the real tokens of rows whose own expert updates it."""
    for layer, scores_BTE in step.scores.items():
        num_tokens = scores_BTE.shape[1]
        real_BT = step.mask_of(num_tokens)
        if real_BT is None or real_BT.shape[1] != num_tokens:
            real_BT = step.mask_BT.new_ones(1, num_tokens).bool()
        present_P = torch.tensor(router.members.layers[layer].experts, device=step.expert_B.device)
        real_BT = real_BT & torch.isin(step.expert_B, present_P)[:, None]
        yield scores_BTE[real_BT], step.expert_B[:, None].expand_as(real_BT)[real_BT]
