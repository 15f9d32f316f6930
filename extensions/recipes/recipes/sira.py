"""SiRA (Zhu et al. 2023, arXiv 2311.09179): sparse top-k experts with a capacity for each, and dropout of experts."""

from dataclasses import dataclass

from loraweave.extend import Count, NonNegative, Positive, Rate
from loraweave.extend.recipes import Site, TopKRecipe
from loraweave.extensions.recipes.limited_gate import LimitedGate


@dataclass(frozen=True, kw_only=True)
class Sira(TopKRecipe):
    """A mixture with w = softmax(r x), kept for the `top_k` highest and 0 for the others, for each token and site.

    In training alone, each expert is withheld from a token with probability `expert_dropout`, and its probability goes to
    the others; `top_k` always stay. And an expert has at most `capacity` times its even share k T/E of each row's tokens,
    those that it weighs most, or without `prioritised` the first ones: to the others it adds exactly 0. None sets no limit,
    nor does evaluation, where a limit would make an output depend on other tokens than its own. `balance` times the mean
    over sites of the loss `mixtral` is added, which is k where all experts are alike.

    Published: 16 experts, of which each token has 4. The defaults of dropout and capacity are ours, and so is whose tokens
    are counted together: each row's, so that no row depends on another. The first of a row are its prompt, which would leave
    little for the answer, the tokens that are learned from.
    """

    num_experts: Count = 16
    top_k: Count = 4
    balance: NonNegative = 0.01
    capacity: Positive | None = 1.25
    prioritised: bool = True
    expert_dropout: Rate = 0.1

    def gate(self, site: Site, num_experts: int) -> LimitedGate:
        return LimitedGate(
            site.num_inputs,
            num_experts,
            top_k=self.top_k,
            sums_to_one=False,
            expert_dropout=self.expert_dropout,
            capacity=self.capacity,
            prioritised=self.prioritised,
        )
