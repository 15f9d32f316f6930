"""Reward ensembles (Zhang et al. 2024, arXiv 2401.16635; Zhai et al. 2024, arXiv 2401.00243): LoRAs on one reward model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraweave.extend import NonNegative
from loraweave.extend.recipes import ATTENTION, FEED_FORWARD
from loraweave.extensions.recipes.losses.nuclear_norm import nuclear_norm
from loraweave.extensions.recipes.row_gates import TaskRecipe


@dataclass(frozen=True, kw_only=True)
class RewardEnsemble(TaskRecipe):
    """A LoRA in every layer and in the head, `score`, of a reward model for each member of the ensemble that `tasks` names.

    A row has the member that `task` names; `extensions/rewards/reward_mixture.py` gives the rewards of all of them, and
    trains them on preferences. In training, `diversity` times the mean over sites of the loss `nuclear_norm` of the members'
    factors a is taken off the loss (UP-RLHF; b, which begins as 0, is left alone). 0 is the plain ensemble. The papers tune
    the coefficient, so that the default is ours.
    """

    target_modules: tuple[str, ...] = (*ATTENTION, *FEED_FORWARD, "score")
    tasks: tuple[str, ...] = ("0", "1", "2", "3", "4")
    diversity: NonNegative = 0.01

    def factor_losses(self, a_SI: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.diversity:
            return {}
        return {"diversity": -self.diversity * torch.stack([nuclear_norm(factor_SI) for factor_SI in a_SI.values()]).mean()}
