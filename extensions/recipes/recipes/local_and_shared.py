"""Two experts that learn in turn: a small one that clients exchange, and one that stays with each (Yi et al. 2023)."""

from dataclasses import dataclass
from typing import Annotated, Literal

from loraweave.extend import Count, Range
from loraweave.extend.recipes import ExpertShape, Site
from loraweave.extensions.recipes.row_gates import ConstantGate, Frozen

Phase = Literal["local", "shared"]


@dataclass(frozen=True, kw_only=True)
class LocalAndShared(Frozen):
    """The mixture y = y0 + alpha / rank * (mu B_0 A_0 x + (1 - mu) B_1 A_1 x); one half learns at a time.

    Expert 0, of `shared_rank`, is the small one of the same shape in all clients, whose mean over clients every one gets
    (`federated_average`); expert 1, of `rank`, stays with the client. In `phase` "local" expert 1 learns from what is
    shared, in "shared" expert 0 from what is local: `with_options(model, phase=...)` goes from one to the other. The weights
    depend on nothing, so that `adapter()` is the whole.

    That is not pFedLoRA (arXiv 2310.13283), where a client's part is a network of its own that learns as a whole, and each
    half has its own loss, weighed by mu: `federate(strategy="pfedlora")`. Here the base is frozen as everywhere, and both
    halves are updates of its layers, weighed in their outputs.
    """

    shared_rank: Count = 4
    mu: Annotated[float, Range(above=0, below=1)] = 0.5
    phase: Phase = "local"

    @property
    def frozen(self) -> tuple[int, ...]:
        return (0,) if self.phase == "local" else (1,)

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((self.shared_rank, self.rank))

    def gate_key(self, site: Site) -> str:
        return "all"

    def gate(self, site: Site, num_experts: int) -> ConstantGate:
        return ConstantGate((self.mu, 1 - self.mu))
