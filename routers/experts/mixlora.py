"""MixLoRA (Li et al. 2024, arXiv 2404.15159): each token's best few of feed-forward blocks that share frozen layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loraweave.hub.whole_number import is_whole
from loraweave.routers.experts._recipe import ExpertShape, Recipe, Site, by_layer
from loraweave.routers.gates.token_gate import TokenGate
from loraweave.routers.losses.mixtral import mixtral
from loraweave.routers.routing.learned_router import Step


@dataclass(frozen=True, kw_only=True)
class Mixlora(Recipe):
    """y = sum over e of w_e * FFN_e(x), where FFN_e is the frozen block with LoRA factors of its own in each of its layers.

    w = softmax over the `top_k` highest of r x, for each token and block, with r drawn from N(0, 0.02). The experts are
    mixed after the non-linearity, so that no expert, and no mixture, is an update of layers. `target_modules` are endings
    of the paths of feed-forward blocks ("DenseReluDense" in T5). `balance` times the mean over blocks of the loss `mixtral`
    is added, 0.001 as in the released code. The paper's plain LoRA at the attention is left out.
    """

    target_modules: tuple[str, ...] = ("mlp",)
    num_experts: int = 8
    top_k: int = 2
    balance: float = 0.001

    form: ClassVar[str] = "feed_forward"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.num_experts, 1):
            self.refuse("num_experts", "it is a whole number of at least 1")
        self.require_count("top_k", self.num_experts)
        if not self.balance >= 0:
            self.refuse("balance", "it is a coefficient of a loss, 0 or more")

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((self.rank,) * self.num_experts)

    def gate(self, site: Site, num_experts: int) -> TokenGate:
        return _NormalGate(site.num_inputs, num_experts, top_k=self.top_k)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        if not self.balance:
            return {}
        return {"balance": self.balance * by_layer(step, lambda scores_NE: mixtral(scores_NE, self.top_k)).mean()}


class _NormalGate(TokenGate):
    def reset(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.r_EI.normal_(std=0.02, generator=generator)
