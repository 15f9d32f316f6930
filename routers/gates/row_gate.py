"""Gates that decide once for a whole row, by its prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from loraweave.errors import ScopeError
from loraweave.routers.gates.call import Call
from loraweave.routers.gates.gate import Gate, Weighing
from loraweave.routers.routing.prompts import current_prompts

# in Call.kept: whether every row was found to have a prompt
_HAVE_PROMPTS = "every row has a prompt"


class RowGate(Gate):
    """Weighs the experts of a site by the mean of its input over the real tokens of a row's prompt.

    What was decided for a row holds for the tokens that follow its prompt. A subclass says how means become weights.
    `padding` counts the prompt's padding in its mean.
    """

    padding = False

    def of_means(self, mean_BI: Tensor, call: Call) -> Weighing:
        """w_B1E and scores_B1E of the call's rows, whose prompts have these means, in fp32 or better."""
        raise NotImplementedError

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        """Raises ScopeError where the site does not see the prompts that the call has."""
        # a site that runs twice in a pass sees other inputs the second time
        place = (self, call.run_of(self))
        # a backward pass that runs layers again needs what the first pass computed, not what it found
        if place in call.kept and torch._C._current_graph_task_id() == -1:
            return of_rows(call.kept[place], len(x_BTI))
        self._require_prompts(x_BTI, call)
        found = self.of_means(prompt_mean(x_BTI, call, padding=self.padding), call)
        call.kept[place] = found
        return found

    def _require_prompts(self, x_BTI: Tensor, call: Call) -> None:
        if call.two_sequences:
            raise ScopeError(
                "a gate that each site has for its rows looks at one sequence, and this model has an encoder and a decoder, "
                "whose tokens differ: take a recipe with one gate for the whole model, or with a gate for each token"
            )
        require_beginning(call)
        tokens = next((values.shape[:2] for values in (call.prompt_BT, call.ids_BT) if values is not None), x_BTI.shape[:2])
        known = current_prompts()
        num_tokens = tokens[1] if known is None else known.mask_BT.shape[1]
        num_rows = tokens[0] if call.num_rows is None else call.num_rows
        if x_BTI.shape[:2] != tokens or x_BTI.shape[1] < num_tokens or len(x_BTI) != num_rows:
            raise ScopeError(
                f"the gate decides by the prompt of a row, {num_rows} rows of {num_tokens} tokens, but its site sees "
                f"{x_BTI.shape[0]} of {x_BTI.shape[1]}: leave such layers out of target_modules, and generate without "
                "prefill_chunk_size"
            )


class ModelGate(Gate):
    """Weighs the experts of all sites alike, by what a row's prompt says before the model has read it."""

    def of_prompts(self, call: Call) -> Weighing:
        """w_B1E and scores_B1E of the rows of a call."""
        raise NotImplementedError

    def begin(self, call: Call) -> None:
        """Decides. Raises ScopeError for a call that goes on from a cache that another one has begun."""
        if self not in call.kept:
            require_beginning(call)
            call.kept[self] = self.of_prompts(call)

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        """Raises ScopeError where no call of the whole model has begun."""
        if self not in call.kept:
            raise ScopeError(
                "the gate decides by the prompts of the whole model's call, and this layer runs outside of one: call the "
                "model with token ids, or generate() from them"
            )
        return of_rows(call.kept[self], len(x_BTI))


def of_rows(weighing: Weighing, num_rows: int) -> Weighing:
    """The weights of rows of which each has several on end, such as beams."""
    w_BTE, scores_BTE = weighing
    copies = num_rows // len(w_BTE)
    if copies <= 1:
        return weighing
    scores_BTE = None if scores_BTE is None else scores_BTE.repeat_interleave(copies, dim=0)
    return Weighing(w_BTE.repeat_interleave(copies, dim=0), scores_BTE)


def require_beginning(call: Call) -> None:
    """Raises ScopeError for a call whose rows began in another one, whose prompts nothing was decided by."""
    if call.follows:
        raise ScopeError(
            "the gate decides by the prompt of a row, which this call with a cache has not: use the model's own generate(), "
            "which keeps what was decided, or call the model with the whole rows"
        )


def prompt_mean(x_BTI: Tensor, call: Call, *, padding: bool = False) -> Tensor:
    """The mean_BI of x over the real tokens of each row's prompt, in fp32 or better; `padding` counts that, too.

    Raises ScopeError for a row that has no such token.
    """
    x_BTI = x_BTI.to(torch.promote_types(x_BTI.dtype, torch.float32))
    counts_BT = call.prompt_BT
    if counts_BT is None:
        return x_BTI.mean(dim=1)
    # one look at the values is enough for all sites
    if _HAVE_PROMPTS not in call.kept:
        if not (has_B := counts_BT.any(dim=1)).all():
            row = has_B.tolist().index(False)
            raise ScopeError(
                f"the gate decides by the prompt of a row, and row {row} has none, as all its tokens have labels: set the "
                "labels of what is given to -100"
            )
        call.kept[_HAVE_PROMPTS] = True
    if padding and call.real_BT is not None:
        counts_BT = counts_BT | ~call.real_BT
    counts_BT1 = counts_BT[..., None]
    # what padding holds may be no number
    return torch.where(counts_BT1, x_BTI, 0).sum(dim=1) / counts_BT1.sum(dim=1)
