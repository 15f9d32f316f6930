"""The tokens of a job's rows in a wider pass: those that a pass of its rows alone would have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.composer.batches import EncodedRow


@dataclass(frozen=True)
class OwnWidth:
    """For each width that a pass has, that of tokens of the encoder or of the decoder, (first, number) of the job's own.

    Whatever is drawn for tokens, and whatever counts padding, then does not depend on the rows of others.
    """

    columns: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Mapping[str, Any], rows: Sequence[EncodedRow], *, two_sequences: bool) -> Self:
        """Of a call's arguments, cut to the job's rows; all tokens where no mask tells which are padding."""
        mask_BT = inputs.get("attention_mask")
        if not isinstance(mask_BT, Tensor) or mask_BT.ndim != 2 or not mask_BT.any():
            return cls()
        real = mask_BT.any(dim=0).nonzero()[:, 0].tolist()
        if not two_sequences:
            return cls({mask_BT.shape[1]: (real[0], real[-1] + 1 - real[0])})
        given = inputs.get("decoder_input_ids")
        if given is None or not rows or given.shape[1] == mask_BT.shape[1]:
            return cls()
        # as `told_apart` makes it of these rows
        decoder = max(2, *(len(row.target) for row in rows))
        encoder = real[-1] + 1
        return cls({mask_BT.shape[1]: (0, encoder + (encoder == decoder)), given.shape[1]: (0, decoder)})

    def cut(self, value: Tensor, *, mask: bool = False) -> Tensor:
        """The job's own columns of a tensor (rows, tokens, ..), whose last one is repeated where the pass has fewer.

        Such a column more is of padding (`told_apart` adds it), as a `mask` says. Other tensors are as they are.
        """
        if value.ndim < 2 or value.shape[1] not in self.columns:
            return value
        first, number = self.columns[value.shape[1]]
        found = value[:, first : first + number]
        lacking = number - found.shape[1]
        if not lacking:
            return found
        more = found[:, -1:].expand(-1, lacking, *found.shape[2:])
        return torch.cat([found, torch.zeros_like(more) if mask else more], dim=1)

    def put(self, value: Tensor, width: int) -> Tensor:
        """(rows, tokens, features) of the job's own columns in a tensor of this width, 0 elsewhere."""
        if width not in self.columns:
            return value
        first = self.columns[width][0]
        kept = value[:, : width - first]
        return functional.pad(kept, (0, 0, first, width - first - kept.shape[1]))
