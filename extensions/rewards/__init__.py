"""How good is a text, and how sure is an answer? Rewards of several mixtures, and posteriors of trained adapters.

It adds heads that read each member of an ensemble (`rewards`, `train_reward_heads`), one head or several over all members
(DMoERM), and Laplace-LoRA (`laplace`). Rewards cost one pass of every text under each member; a posterior costs a pass with
gradients for each example and label.
"""

from loraweave.extend import face

_MODULES = {
    "posterior": "laplace",
    "reward_heads": "Rewards rewards train_reward_heads",
    "reward_mixture": "RewardMixture expert_rewards train_reward_experts train_reward_mixture",
    "routed_rewards": "RoutedRewards train_routed_rewards",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
