"""MultiLoRA (Wang et al. 2023, arXiv 2311.11501): several LoRAs in parallel, each with a learned gain for every output."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loraweave.extend import Count
from loraweave.extend.recipes import ExpertShape, Gate, Recipe, Site, uniform


@dataclass(frozen=True, kw_only=True)
class Multilora(Recipe):
    """The sum y = y0 + alpha / rank * sum over j of gain_j * (B_j A_j x), with no gate: all `num_experts` are always on.

    gain_jO begins as 0 instead of B, which is drawn uniformly as A is, each by its own number of inputs, so that no few
    directions take all of the update. `adapter()` is the whole as one adapter, of at most `num_experts` times the rank. The
    paper has 3 to 5 experts of rank 32.
    """

    num_experts: Count = 3

    silent_at_first: ClassVar[tuple[str, ...]] = ("a_SI", "b_SO")

    def shape(self, site: Site) -> ExpertShape:
        return ExpertShape((self.rank,) * self.num_experts, gains=True)

    def gate(self, site: Site, num_experts: int) -> Gate | None:
        return None

    def start(self, site: Site, expert: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a_RI uniformly between -1/sqrt(I) and 1/sqrt(I), b_RO between -1/sqrt(R) and 1/sqrt(R)."""
        a_RI = uniform(rank, site.num_inputs, generator)
        return a_RI, uniform(site.num_outputs, rank, generator).T
