"""One expert for each token, as in Switch Transformers (Fedus et al. 2021, arXiv 2101.03961): a plain baseline."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from loraweave.extend import NonNegative, Positive, get
from loraweave.extend.recipes import EvenRecipe, Site, balance_term, by_layer
from loraweave.extend.routing import Step
from loraweave.extensions.recipes.limited_gate import LimitedGate

z = get("losses", "z")


@dataclass(frozen=True, kw_only=True)
class Switch(EvenRecipe):
    """A mixture of one expert for each token and site: w = softmax(r x) for the highest, 0 for the others.

    The probability stays below 1, and gives the gate its gradient. In training an expert takes at most `capacity` times its
    even share T/E of each row's tokens, the first ones, or with `prioritised` those with the largest weights for it; to the
    others it adds exactly 0. None sets no limit, nor does evaluation. `balance` times the mean over sites of the loss
    `switch`, 1 if all experts are used equally, and `z` times that of the loss `z` (Zoph et al. 2022, arXiv 2202.08906) are
    added. Published: 0.01 and a capacity of 1.25 for the first tokens; without z.

    The paper counts capacity over all tokens on a device; here, as in transformers, each row is counted separately, so that
    no row's output depends on another. Its noise on the gate's inputs in training is left out.
    """

    balance: NonNegative = 0.01
    z: NonNegative = 0.0
    capacity: Positive | None = 1.25
    prioritised: bool = False

    def gate(self, site: Site, num_experts: int) -> LimitedGate:
        return LimitedGate(
            site.num_inputs, num_experts, top_k=1, sums_to_one=False, capacity=self.capacity, prioritised=self.prioritised
        )

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        return {**balance_term(self.balance, step, 1), **({"z": self.z * by_layer(step, z).mean()} if self.z else {})}
