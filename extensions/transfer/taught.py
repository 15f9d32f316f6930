"""Rows whose answers another model has given: the loss is how far the predictions at their tokens are from that model's.

Hinton et al. 2015, arXiv 1503.02531, at temperature 1, on the likeliest tokens and one class of all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraweave.extend import IGNORED, EncodedRow, TargetBatch, batch, in_chunks, target_logits

# tokens whose probabilities are kept at each place
LIKELIEST = 64
BATCH_SIZE = 16


@dataclass(frozen=True, eq=False)
class TaughtRow(EncodedRow):
    """A row with the teacher's M likeliest tokens at each of the target's K tokens, and their probabilities.

    ids_KM are token ids, p_KN has N = M + 1 values in fp32 that sum to 1, the last that of all other tokens.
    """

    ids_KM: Tensor
    p_KN: Tensor

    @staticmethod
    def losses(model: Any, rows: Sequence[TaughtRow], stacked: TargetBatch) -> Tensor:
        """Return loss_BK = KL(teacher || model) at each token, in nats, fp32; 0 where a target is shorter than K."""
        asked_BK = stacked.targets_BK != IGNORED
        logits_NV = target_logits(model, stacked)[asked_BK]
        ids_NM, p_NN = (
            torch.cat(parts).to(logits_NV.device) for parts in zip(*((r.ids_KM, r.p_KN) for r in rows), strict=True)
        )
        loss_N = (torch.xlogy(p_NN, p_NN) - p_NN * _log_shares(logits_NV, ids_NM)).sum(dim=1)
        return loss_N.new_zeros(asked_BK.shape).masked_scatter(asked_BK, loss_N)


@torch.no_grad()
def taught_by(model: Any, tokenizer: Any, rows: Sequence[EncodedRow]) -> list[TaughtRow]:
    """Return the rows with the model's predictions for their targets."""
    taught: list[TaughtRow] = []
    for part in in_chunks(list(rows), BATCH_SIZE):
        stacked = batch(model, tokenizer, part)
        logits_NV = target_logits(model, stacked)[stacked.targets_BK != IGNORED]
        ids_NM = logits_NV.topk(min(LIKELIEST, logits_NV.shape[1]), dim=1).indices
        log_p_NN = _log_shares(logits_NV, ids_NM)
        counts = [len(row.target) for row in part]
        pairs = zip(part, torch.split(ids_NM.cpu(), counts), torch.split(log_p_NN.exp().cpu(), counts), strict=True)
        taught += [TaughtRow(row.prompt, row.target, ids_KM, p_KN) for row, ids_KM, p_KN in pairs]
    return taught


def _log_shares(logits_NV: Tensor, ids_NM: Tensor) -> Tensor:
    """Return the log-probabilities of these tokens, and of all others together, in fp32."""
    log_p_NM = logits_NV.float().log_softmax(dim=1).gather(1, ids_NM)
    # below 1, as rounding may not leave it
    named_N1 = log_p_NM.exp().sum(dim=1, keepdim=True).clamp(max=1 - torch.finfo(torch.float32).eps)
    return torch.cat([log_p_NM, torch.log1p(-named_N1)], dim=1)
