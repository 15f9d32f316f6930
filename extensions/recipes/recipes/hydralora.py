"""HydraLoRA (Tian et al. 2024, arXiv 2404.19245): one a for all experts, and a b for each."""

from dataclasses import dataclass

from loraweave.extend import Count, Positive, Rate
from loraweave.extend.recipes import EvenRecipe, ExpertShape, Site, TokenGate


@dataclass(frozen=True, kw_only=True)
class Hydralora(EvenRecipe):
    """The mixture y = y0 + alpha / rank * sum over e of w_e B_e A x, with w = softmax(r x), for each token and site.

    All experts of a site have one A. No loss is added. Sizes are those of the released script; `experts_for(texts)` of the
    extension `recipes` says how many experts the data asks for.
    """

    rank: Count = 4
    alpha: Positive | None = 32.0
    dropout: Rate = 0.05
    num_experts: Count = 4

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((self.rank,) * self.num_experts, shared_a=True)

    def gate(self, site: Site, num_experts: int) -> TokenGate:
        return TokenGate(site.num_inputs, num_experts)
