"""MixLoRA (Li et al. 2024, arXiv 2404.15159): each token's best few of feed-forward blocks that share frozen layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loraweave.extend import Count, NonNegative, Positive, Share, get
from loraweave.extend.recipes import EvenRecipe, Site, balance_term, by_layer
from loraweave.extend.routing import Step
from loraweave.extensions.recipes.limited_gate import LimitedGate

z = get("losses", "z")


@dataclass(frozen=True, kw_only=True)
class Mixlora(EvenRecipe):
    """The mixture y = sum over e of w_e * FFN_e(x), where FFN_e is the frozen block with LoRA factors in each of its layers.

    The experts are mixed after the non-linearity, so that no expert, and no mixture, is an update of layers.
    `target_modules` are endings of the paths of feed-forward blocks ("DenseReluDense" in T5). For each token and block, with
    r drawn from N(0, 0.02), w is by `routing`

    - "top_k": softmax over the `top_k` highest of r x;
    - "top_p": softmax(r x) over the fewest that sum to `top_p`, made to sum to 1 (the released "dynamic");
    - "switch": the highest of softmax(r x) as it is, and the frozen block has the rest; in training an expert has, of a row,
      `capacity` times its even share of tokens, and the frozen block those above it.

    `balance` times the mean over blocks of E * sum over e of f_e p_e is added, f_e the fraction of tokens that have e, p_e
    the mean of softmax(r x); 0.001 as in the released code. With "switch" so is `z` times the loss `z`. In the released code
    the weights of "top_p" and "switch" sum to less than 1 without a rest for the frozen block, so that it does not begin as
    the base, and "switch" leaves the block out in evaluation. The paper's plain LoRA at the attention is left out.
    """

    target_modules: tuple[str, ...] = ("mlp",)
    routing: Literal["top_k", "top_p", "switch"] = "top_k"
    top_k: Count = 2
    top_p: Share = 0.8
    capacity: Positive | None = None
    balance: NonNegative = 0.001
    z: NonNegative = 0.001

    form: ClassVar[str] = "feed_forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.routing == "top_k":
            self.require_top_k(self.num_experts)

    def gate(self, site: Site, num_experts: int) -> LimitedGate:
        chosen: dict[str, dict[str, Any]] = {
            "top_k": {"top_k": self.top_k},
            "top_p": {"top_p": self.top_p},
            "switch": {"top_k": 1, "sums_to_one": False, "capacity": self.capacity},
        }
        return _NormalGate(site.num_inputs, num_experts, **chosen[self.routing])

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        if self.routing == "top_p":
            return {"balance": self.balance * _of_those_chosen(step)} if self.balance else {}
        losses = dict(balance_term(self.balance, step, self.top_k if self.routing == "top_k" else 1))
        if self.routing == "switch" and self.z:
            losses["z"] = self.z * by_layer(step, z).mean()
        return losses


class _NormalGate(LimitedGate):
    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.r_EI.normal_(std=0.02, generator=generator)


def _of_those_chosen(step: Step) -> Tensor:
    """Return the mean over sites of E * sum over e of f_e p_e, f_e being the share of tokens whose weight of e is not 0."""
    losses = []
    for site, scores_BTE in step.scores.items():
        p_NE, w_NE = step.real(scores_BTE).softmax(dim=1), step.real(step.weights[site])
        losses.append(w_NE.shape[1] * ((w_NE != 0).to(p_NE).mean(dim=0) * p_NE.mean(dim=0)).sum())
    return torch.stack(losses).mean()
