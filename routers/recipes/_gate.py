"""The base class of gates, the call of the model that they look at, and the gate that weighs each token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.routers.tokens._learned import Step, require_alike
from loraweave.routers.tokens._scores import top_k_softmax


class Weighing(NamedTuple):
    """The weights w_BTE of experts, with B or T of 1 if all rows or tokens share them, and the tensors that losses need.

    `scores_BTE` are the scores before softmax and choice, `beside` is any other tensor that a loss reads; None if absent.
    """

    w_BTE: Tensor
    scores_BTE: Tensor | None = None
    beside: Tensor | None = None


class Gate(nn.Module):
    """A module that weighs the experts of one place of a model, or of several that share it.

    `most` is how many weights of a token can be other than 0. `skips` is True if a weight of exactly 0 has no gradient, so
    that its expert may be left out. `static` is True if the weights depend on no input, but at most on a call's tasks: with
    None as x_BTI they are the same.
    """

    static: bool = False
    skips: bool = False
    # a class for trainings of models with such gates, made from (model, report): `see(step, labels_BK)` gets each pass and
    # the labels of its last K tokens, None if labels are not per token; `end_step(summed)`, with a function that adds a
    # tensor up over processes, may change `moved` and returns a text to show, "" for none
    watcher: ClassVar[Any] = None

    def __init__(self, num_experts: int, *, most: int | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.most = num_experts if most is None else most

    def reset(self, generator: torch.Generator) -> None:
        """Draw the gate's initial values."""

    def begin(self, call: Call) -> None:
        """Prepare for a call, or for a generation from its prompts, before any layer runs; by default do nothing."""

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        """Weigh the experts of a layer's input. Row b depends on row b alone, and on no padding."""
        raise NotImplementedError

    @property
    def moved(self) -> list[nn.Parameter]:
        """The parameters without a gradient that the gate's watcher changes in training."""
        return []


@dataclass(eq=False)
class Call:
    """One pass of the model: its tokens, and what is known of each row.

    `real_BT` marks the tokens that are not padding, `prompt_BT` those of the row's prompt; None marks all. `ids_BT` are the
    token ids and `embed` returns their input embeddings x_BTI, where they are known. `task_B` is the index of each row's
    task in the recipe's `tasks`, `UNKNOWN` for a row without one; None if no task was given. `follows` is True if a cache
    has earlier tokens. `kept` is one mapping for all passes of a generation, in which a gate keeps its decision for a row.
    `step` takes notes for losses and reports, None outside training. `two_sequences` is True for an encoder-decoder, whose
    real tokens in a training are `decoder_BT`; `num_rows` is B, where it is known. `runs` is the counter that `run_of`
    keeps, {key: number of runs within the pass}.
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
        """Return how often the key `what` was counted before in this pass, and count it once more."""
        self.runs[what] += 1
        return self.runs[what] - 1

    def real_of(self, x_BTI: Tensor) -> Tensor | None:
        """Return real_BT for the tokens of a layer's input; None if all are real, or if x's B and T are not the call's.

        Raises ScopeError if x may be the encoder's or the decoder's and their padding differs.
        """
        of_encoder_BT, of_decoder_BT = self._of(self.real_BT, x_BTI), self._of(self.decoder_BT, x_BTI)
        if of_encoder_BT is None or of_decoder_BT is None:
            return of_decoder_BT if of_encoder_BT is None else of_encoder_BT
        require_alike(of_encoder_BT, of_decoder_BT)
        return of_encoder_BT

    def prompt_of(self, x_BTI: Tensor) -> Tensor | None:
        """Return prompt_BT for a layer's input; None if all tokens are of prompts, or if x's B and T are not the call's."""
        return self._of(self.prompt_BT, x_BTI)

    @staticmethod
    def _of(mask_BT: Tensor | None, x_BTI: Tensor) -> Tensor | None:
        return mask_BT if mask_BT is not None and mask_BT.shape == x_BTI.shape[:2] else None


@torch.no_grad()
def draw_linear(weight_EI: Tensor, generator: torch.Generator) -> None:
    """Fill a weight as torch draws a linear layer: uniformly between -1/sqrt(I) and 1/sqrt(I)."""
    bound = weight_EI.shape[-1] ** -0.5
    weight_EI.uniform_(-bound, bound, generator=generator)


class TokenGate(Gate):
    """A gate with w = softmax(r x) over each token's `top_k` highest scores, with r_EI; in fp32 or better.

    `top_k` None takes all experts. In training only, `noise` adds normal noise to r x, with standard deviation softplus(n x)
    and a learned n_EI. The weighing's scores are the arguments of the softmax. A subclass may override `scores` or `choose`.
    """

    # a weight of 0 comes from the choice, or a softmax that rounds to 0, neither of which passes a gradient on
    skips = True

    def __init__(self, num_inputs: int, num_experts: int, *, top_k: int | None = None, noise: bool = False) -> None:
        super().__init__(num_experts, most=top_k)
        self.top_k = top_k
        self.r_EI = nn.Parameter(torch.empty(num_experts, num_inputs))
        self.n_EI = nn.Parameter(torch.empty(num_experts, num_inputs)) if noise else None

    def reset(self, generator: torch.Generator) -> None:
        """Draw r_EI as torch draws a linear layer, uniformly between -1/sqrt(I) and 1/sqrt(I), and set n_EI to 0."""
        draw_linear(self.r_EI, generator)
        if self.n_EI is not None:
            nn.init.zeros_(self.n_EI)

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        scores_BTE = self.scores(x_BTI.to(self.r_EI.dtype))
        return Weighing(self.choose(scores_BTE), scores_BTE)

    def scores(self, x_BTI: Tensor) -> Tensor:
        """Return scores_BTE of the experts: r x, in training with its noise."""
        scores_BTE = functional.linear(x_BTI, self.r_EI)
        if self.training and self.n_EI is not None:
            scores_BTE = noisy(scores_BTE, x_BTI @ self.n_EI.T)
        return scores_BTE

    def choose(self, scores_BTE: Tensor) -> Tensor:
        """Return w_BTE: by default the softmax over each token's `top_k` highest scores, 0 elsewhere."""
        return top_k_softmax(scores_BTE, self.top_k)


def noisy(scores_BTE: Tensor, spread_BTE: Tensor) -> Tensor:
    """Add normal noise with the standard deviation softplus(spread) to scores (Shazeer et al. 2017, arXiv 1701.06538)."""
    return scores_BTE + torch.randn_like(scores_BTE) * functional.softplus(spread_BTE)
