"""Conditional MixLoRA (Shen et al. 2024, arXiv 2402.15896): each row's factors are chosen from pools of rank 1."""

from dataclasses import dataclass
from typing import ClassVar

from loraweave.extend import Count, NonNegative
from loraweave.extend.recipes import ExpertShape, Recipe, Site
from loraweave.extensions.recipes.row_gates import FactorGate


@dataclass(frozen=True, kw_only=True)
class MixloraConditional(Recipe):
    """The mixture y = y0 + alpha / rank * sum over p of b_p (a_p x), p = 1 .. rank, for each row with factors of its own.

    A site has `num_experts` factors a_I and as many b_O, and selectors r_a, r_b and k_1 .. k_rank, one row for each factor.
    With h the mean of the site's input over a row's prompt, a_p is the factor a of the p-th highest r_a h. b_p is that of
    the p-th highest r_b h if `conditional` is False, else of the p-th highest softmax(r_b h) + `a_weight` * softmax(sum over
    q of softmax(k_q a_q)). The chosen factors enter the output unscaled; the selectors learn by a straight-through gradient,
    the one that a factor times its softmax score would have. `alpha` None is 2 * num_experts, as in the released script.

    `as_released` follows the released code in two ways: no score is multiplied with a factor, so the selectors never learn
    and are frozen here, and padding counts in the mean. One difference stays: the released mean is over all tokens (when
    training the answer's, too; when generating only the latest), here it is over the prompt.
    """

    rank: Count = 4
    num_experts: Count = 16
    conditional: bool = True
    a_weight: NonNegative = 1.0
    as_released: bool = False

    form: ClassVar[str] = "selected_factors"
    silent_at_first: ClassVar[tuple[str, ...]] = ("a_EI", "k_REI")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank > self.num_experts:
            self.refuse("rank", f"so many factors are chosen of the {self.num_experts} of num_experts: take that at most")

    @property
    def scale(self) -> float:
        return (2.0 * self.num_experts if self.alpha is None else self.alpha) / self.rank

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((1,) * self.num_experts)

    def gate(self, site: Site, num_experts: int) -> FactorGate:
        gate = FactorGate(site.num_inputs, num_experts, padding=self.as_released)
        # the released code gives the gate no gradient
        return gate.requires_grad_(not self.as_released)
