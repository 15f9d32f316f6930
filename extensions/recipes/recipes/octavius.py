"""Octavius (Chen et al., ICLR 2024, arXiv 2311.02684): one gate for the whole model, which reads a row's instruction."""

from dataclasses import dataclass

from loraweave.extend import Count
from loraweave.extend.recipes import EvenRecipe, Site
from loraweave.extensions.recipes.row_gates import EmbeddingGate, embedding_size


@dataclass(frozen=True, kw_only=True)
class Octavius(EvenRecipe):
    """A mixture with w = softmax over the `top_k` highest of r mean(x), x the input embeddings of a row's prompt.

    All sites and tokens of a row have the same w. The prompt is what stands before the first label, or what generate() is
    given; its padding does not count.

    With `as_released` it is the authors' code where that differs from the paper: no alpha / rank before the sum, padding
    counted in the mean, so that a row's weights depend on how it is padded, and r drawn from the normal distribution, which
    prefers one expert from the beginning. Rules there for a second expert have no effect, and are left out.
    """

    rank: Count = 32
    num_experts: Count = 4
    top_k: Count = 2
    as_released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_top_k(self.num_experts)

    @property
    def scale(self) -> float:
        return 1.0 if self.as_released else super().scale

    def gate_key(self, site: Site) -> str:
        return "all"

    def gate(self, site: Site, num_experts: int) -> EmbeddingGate:
        """Make the gate. Raises LayerMismatch for a model without input embeddings."""
        return EmbeddingGate(
            embedding_size(self, site), num_experts, top_k=self.top_k, normal=self.as_released, padding=self.as_released
        )
