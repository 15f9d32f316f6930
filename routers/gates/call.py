"""What the gates of a trainable mixture know of the call that runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loraweave.routers.routing.learned_router import Step, require_alike

UNKNOWN = -1


@dataclass(eq=False)
class Call:
    """One pass of the model: its tokens, and what each row is.

    `real_BT` and `prompt_BT` say which tokens are no padding, and which of those are of the row's prompt; None is all.
    `ids_BT` are the tokens themselves and `embed` gives their input embeddings x_BTI, where they are known. `task_B` has the
    place of each row's task among the recipe's tasks, `UNKNOWN` where it has none; None where no task was given. `follows`
    says that a cache has tokens before these. `kept` is the same mapping in all passes of a generation: what a gate has
    decided for a row is kept there. `step` takes notes for losses and reports, where there are some. `two_sequences` says
    that the model has an encoder and a decoder, whose real tokens in a training are `decoder_BT`; `num_rows` is how many
    rows the call has, where that is known. `runs` counts what runs several times within the pass.
    """

    real_BT: Tensor | None = None
    prompt_BT: Tensor | None = None
    ids_BT: Tensor | None = None
    task_B: Tensor | None = None
    follows: bool = False
    kept: dict[Hashable, Any] = field(default_factory=dict)
    step: Step | None = None
    embed: Callable[[], Tensor] | None = None
    two_sequences: bool = False
    num_rows: int | None = None
    decoder_BT: Tensor | None = None
    runs: Counter[Hashable] = field(default_factory=Counter)

    def run_of(self, what: Hashable) -> int:
        """How often that ran before in this pass; it is counted as one more run."""
        self.runs[what] += 1
        return self.runs[what] - 1

    def real_of(self, x_BTI: Tensor) -> Tensor | None:
        """real_BT for the tokens of a layer's input; None where all are real, or are others than the call's.

        Raises ScopeError where it could be an encoder's or a decoder's, whose padding differs.
        """
        of_encoder_BT, of_decoder_BT = self._of(self.real_BT, x_BTI), self._of(self.decoder_BT, x_BTI)
        if of_encoder_BT is None or of_decoder_BT is None:
            return of_decoder_BT if of_encoder_BT is None else of_encoder_BT
        require_alike(of_encoder_BT, of_decoder_BT)
        return of_encoder_BT

    def prompt_of(self, x_BTI: Tensor) -> Tensor | None:
        """prompt_BT for the tokens of a layer's input; None where all count, or are others than the call's."""
        return self._of(self.prompt_BT, x_BTI)

    @staticmethod
    def _of(mask_BT: Tensor | None, x_BTI: Tensor) -> Tensor | None:
        return mask_BT if mask_BT is not None and mask_BT.shape == x_BTI.shape[:2] else None
