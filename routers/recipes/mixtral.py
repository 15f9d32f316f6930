"""The best few experts for each token, as in Mixtral (Jiang et al. 2024, arXiv 2401.04088): a plain baseline."""

from dataclasses import dataclass

from loraweave.common.options import NonNegative
from loraweave.routers.recipes._gate import TokenGate
from loraweave.routers.recipes._recipe import Site, TopKRecipe


@dataclass(frozen=True, kw_only=True)
class Mixtral(TopKRecipe):
    """A mixture with w = softmax over the `top_k` highest of r x, for each token and site.

    `balance` times the mean over sites of the loss `mixtral` is added, which is k where all experts are alike; 0.02 in the
    published model's configuration. With `noise`, training adds to r x normal noise with the standard deviation
    softplus(n x), n learned from 0 on: noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538).
    """

    balance: NonNegative = 0.02
    noise: bool = False

    def gate(self, site: Site, num_experts: int) -> TokenGate:
        return TokenGate(site.num_inputs, num_experts, top_k=self.top_k, noise=self.noise)
