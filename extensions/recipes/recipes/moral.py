"""MoRAL (Yang et al. 2024, arXiv 2402.11260): top-k experts for lifelong learning from questions and answers."""

from dataclasses import dataclass

from loraweave.extend.recipes import FEED_FORWARD, TopKRecipe


@dataclass(frozen=True, kw_only=True)
class Moral(TopKRecipe):
    """A mixture with w = softmax over the `top_k` highest of r x, for each token and site of the feed-forward layers.

    MoRAL differs in its data, pairs of a question and its answer one after the other, and in its evaluation; its mixture is
    this plain one. `balance` times the mean over sites of the loss `mixtral` may be added, by default nothing. The defaults
    of the number of experts, k and the rank are ours.
    """

    target_modules: tuple[str, ...] = FEED_FORWARD
