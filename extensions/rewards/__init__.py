"""How good is a text, and how sure is an answer? Rewards of several mixtures, and posteriors of trained adapters.

It adds heads that read each member of an ensemble (`rewards`, `train_reward_heads`), one head or several over all members
(DMoERM), and Laplace-LoRA (`laplace`). Rewards cost one pass of every text under each member; a posterior costs a pass with
gradients for each example and label.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.rewards.posterior import laplace
    from loraweave.extensions.rewards.reward_heads import Rewards, rewards, train_reward_heads
    from loraweave.extensions.rewards.reward_mixture import (
        RewardMixture,
        expert_rewards,
        train_reward_experts,
        train_reward_mixture,
    )
    from loraweave.extensions.rewards.routed_rewards import RoutedRewards, train_routed_rewards
else:
    __getattr__ = lazy(
        __name__,
        {
            f"{__name__}.posterior": "laplace",
            f"{__name__}.reward_heads": "Rewards rewards train_reward_heads",
            f"{__name__}.reward_mixture": "RewardMixture expert_rewards train_reward_experts train_reward_mixture",
            f"{__name__}.routed_rewards": "RoutedRewards train_routed_rewards",
        },
    )

__all__ = [
    "RewardMixture",
    "Rewards",
    "RoutedRewards",
    "expert_rewards",
    "laplace",
    "rewards",
    "train_reward_experts",
    "train_reward_heads",
    "train_reward_mixture",
    "train_routed_rewards",
]
