"""LoRA-Mixer (Li et al., ICLR 2026, arXiv 2507.00029): experts of the attention's layers, all in training, then the best."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.extend import Count, NonNegative, get
from loraweave.extend.recipes import Call, EvenRecipe, Site, TokenGate, Weighing, by_layer
from loraweave.extend.routing import Step, top_k_softmax

mixtral = get("losses", "mixtral")


@dataclass(frozen=True, kw_only=True)
class LoraMixer(EvenRecipe):
    """The mixture y = y0 + alpha / rank * sum over e of w_e B_e A_e x, by token and site, at the layers of the attention.

    In training w = softmax(r x) over all experts; otherwise softmax over the `top_k` highest of r x, 3 as published. The
    loss gains the mean over sites of `balance` * sum over e of p_e f_e + `entropy` * the mean of H(softmax(r x)), over real
    tokens, p_e the mean of softmax(r x) and f_e the share of e of all choices of `top_k`: experts are used alike, and each
    token has few. By its text the published term makes choices sharper; its formula as printed subtracts the entropy, which
    an `entropy` below 0 does.

    With `hard`, the published way to train experts together on labelled data, a row has only the expert with its task's
    index, at weight 1, and the gates do not learn: `with_options(model, hard=False)` goes on with the gates. Or experts
    begin as adapters (`pool=`), whose factors `requires_grad_(False)` freezes, instead of the published penalty on how far
    they move. The authors have released no code, and the formulas are as accounts of the paper print them; both coefficients
    are ours.
    """

    num_experts: Count = 8
    top_k: Count = 3
    balance: NonNegative = 0.01
    entropy: float = 0.001
    hard: bool = False

    heeds_tasks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_top_k(self.num_experts)
        if self.hard and len(self.tasks) > self.num_experts:
            self.refuse("num_experts", f"with hard each of the {len(self.tasks)} tasks has an expert of its own")

    def gate(self, site: Site, num_experts: int) -> TokenGate:
        gate = _MixerGate(site.num_inputs, num_experts, top_k=self.top_k, hard=self.hard)
        # the gate's scores do not count for a row with a task
        return gate.requires_grad_(not self.hard)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        if self.hard:
            return {}
        losses = {}
        if self.balance:
            # `mixtral` is E * k times the sum
            losses["balance"] = self.balance * by_layer(step, self._overlap).mean()
        if self.entropy:
            losses["entropy"] = self.entropy * by_layer(step, _entropy).mean()
        return losses

    def _overlap(self, scores_NE: Tensor) -> Tensor:
        overlap: Tensor = mixtral(scores_NE, self.top_k) / (scores_NE.shape[1] * self.top_k)
        return overlap


def _entropy(scores_NE: Tensor) -> Tensor:
    entropy_N: Tensor = torch.special.entr(scores_NE.softmax(dim=1)).sum(dim=1)
    return entropy_N.mean()


class _MixerGate(TokenGate):
    def __init__(self, num_inputs: int, num_experts: int, *, top_k: int, hard: bool) -> None:
        # in training all experts of a token count
        super().__init__(num_inputs, num_experts)
        self.best, self.hard = top_k, hard

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        weighing = super().forward(x_BTI, call)
        if not self.hard or call.task_B is None:
            return weighing
        # a row may have several copies, such as beams
        task_B = call.task_B.repeat_interleave(len(x_BTI) // len(call.task_B))
        own_B1E = functional.one_hot(task_B.clamp(min=0), self.num_experts).to(weighing.w_BTE)[:, None]
        return weighing._replace(w_BTE=torch.where((task_B >= 0)[:, None, None], own_B1E, weighing.w_BTE))

    def choose(self, scores_BTE: Tensor) -> Tensor:
        return top_k_softmax(scores_BTE, None if self.training else self.best)
