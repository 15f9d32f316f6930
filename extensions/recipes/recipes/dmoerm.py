"""DMoERM (Quan 2024, arXiv 2403.01197): a LoRA for each capability of a reward model, whose features one head combines."""

from dataclasses import dataclass

from loraweave.extend.recipes import ATTENTION, FEED_FORWARD
from loraweave.extensions.recipes.row_gates import TaskRecipe


@dataclass(frozen=True, kw_only=True)
class Dmoerm(TaskRecipe):
    """A LoRA in every layer and in the head, `score`, for each capability point of a reward model that `tasks` names.

    This is the second of the published phases, in which each learns from the preferences that were labelled for its point
    (`extensions/rewards/reward_mixture.py`). In the third they are frozen, and `extensions/rewards/reward_mixture.py` reads
    their last hidden states beside each other: Linear(T h -> h), PReLU, Linear(h -> 1), in the order of the members. The
    outer mixture (`extensions/rewards/routed_rewards.py`) gives a text to the one of several such heads whose category a
    router finds in the question.
    In the released code the heads of the points are in no module, and so are lost when it is saved; here they are factors.
    """

    target_modules: tuple[str, ...] = (*ATTENTION, *FEED_FORWARD, "score")
