"""Mixture-of-LoRAs (Feng et al., LREC-COLING 2024, arXiv 2403.03432): each layer learns to choose a domain's LoRA by row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loraweave.extend import NonNegative, get
from loraweave.extend.recipes import ExpertShape, Recipe, Site
from loraweave.extend.routing import Step
from loraweave.extensions.recipes.row_gates import DomainGate

domain = get("losses", "domain")


@dataclass(frozen=True, kw_only=True)
class MixtureOfLoras(Recipe):
    """A mixture with w = 1 for the expert of the highest r mean(x), else 0, by the mean over a row's prompt.

    `tasks` are the domains, each with one expert, and every site decides for itself. `eta` times the sum over sites of the
    cross-entropy of softmax(r mean(x)) with the row's own domain is added to the loss of the model, which teaches the gates
    by the gradient of that softmax (a straight-through estimate); rows without a domain add nothing. With `oracle` rows
    whose domain is given have its expert, and the gates choose for the others.

    The paper's sequence is here the prompt, so that what decides is known when the answer begins. Its first stage trains one
    LoRA for each domain alone: the experts can begin as those.
    """

    eta: NonNegative = 0.1
    oracle: bool = False

    heeds_tasks: ClassVar[bool] = True

    @property
    def num_first_steps(self) -> int:
        return max(len(self.tasks), 1) + 1

    def shape(self, site: Site) -> ExpertShape:
        # until fit() knows the domains there is one expert
        return ExpertShape((self.rank,) * max(len(self.tasks), 1))

    def gate(self, site: Site, num_experts: int) -> DomainGate:
        return DomainGate(site.num_inputs, num_experts, oracle=self.oracle)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        if not self.eta:
            return {}
        losses = [domain(scores_B1E[:, 0], step.expert_B) for scores_B1E in step.scores.values()]
        return {"domain": self.eta * torch.stack(losses).sum()}
