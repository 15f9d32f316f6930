"""Conditional MixLoRA (Shen et al. 2024, arXiv 2402.15896): each row's factors are chosen from pools of rank 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loraweave.extend import Count, ExpertShape, NonNegative, Recipe, Site
from loraweave.extensions.recipes.row_gates import FactorGate


@dataclass(frozen=True, kw_only=True)
class MixloraConditional(Recipe):
    """The mixture y = y0 + alpha / rank * sum over p of b_p (a_p x), with the p-th best of `num_experts` factors a, and b.

    With h the mean of a site's input over the prompt of a row, the best `rank` factors a are those of the highest r_a h, and
    so are those of b where `conditional` is False. Otherwise b is chosen by softmax(r_b h) + `a_weight` * softmax(sum over p
    of softmax(k_p a_p)), by what was chosen of a. The forward is that of the chosen factors as they are; the selectors
    learn straight through it, with the gradient that a factor times its softmax score would have. `alpha` None is
    2 * num_experts, as in the released script.

    In the released code no score meets a factor, so that the selectors keep their random beginning, and padding counts in
    the mean: `as_released`, where they are frozen. There the mean is of all tokens, in training those of the answer too, and
    in a generation of the latest one alone; here it is of the prompt, also then.
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
        # nothing that it says has a gradient
        return gate.requires_grad_(not self.as_released)
