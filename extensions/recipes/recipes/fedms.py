"""FedMS (Wu et al. 2023, arXiv 2312.15926): a client's own expert beside the frozen one that all clients have trained."""

from dataclasses import dataclass

from loraweave.extend import Whole
from loraweave.extend.recipes import ExpertShape, Site
from loraweave.extensions.recipes.row_gates import EmbeddingGate, Frozen, RowGate, embedding_size


@dataclass(frozen=True, kw_only=True)
class Fedms(Frozen):
    """The mixture y = y0 + g E_global(x) + (1 - g) E_local(x), with (g, 1 - g) = softmax(r mean(x)) of a row's prompt.

    Expert 0 is the global one, which does not learn: `put_expert(model, 0, adapter)` puts in what the clients have trained
    together in the first stage. Expert 1 is the client's own. One gate for the whole model sees the input embeddings, or
    with `per_site` each site has one for its input, as models without token embeddings need.

    Of the blocks in the order of `queue`, by default from the first to the last, the first `capability` have a local expert,
    None for all; elsewhere g E_global(x) is all. The paper's Sparsely Activated LoRA activates more of them in training as
    resources allow; here the caller does, by `with_options(model, capability=...)`, and training goes on from there. The
    gates of the clients are averaged in each round (`federated_average`).
    """

    per_site: bool = False
    queue: tuple[Whole, ...] = ()
    capability: Whole | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.queue)) < len(self.queue):
            self.refuse("queue", "it takes the numbers of blocks, each once")

    @property
    def frozen(self) -> tuple[int, ...]:
        return (0,)

    def shape(self, site: Site) -> ExpertShape:
        """Return both experts' ranks, 0 if inactive. Raises WeightingError for blocks that the model lacks."""
        return ExpertShape((self.rank, self.rank if self._is_active(site) else 0))

    def gate_key(self, site: Site) -> str:
        return site.name if self.per_site else "all"

    def gate(self, site: Site, num_experts: int) -> EmbeddingGate | RowGate:
        """Make the gate. Raises LayerMismatch for one gate on a model without input embeddings."""
        if self.per_site:
            return RowGate(site.num_inputs, num_experts)
        return EmbeddingGate(embedding_size(self, site), num_experts, top_k=num_experts)

    def _is_active(self, site: Site) -> bool:
        queue = self.queue or tuple(range(site.num_blocks))
        if not all(block < site.num_blocks for block in queue):
            self.refuse("queue", f"the model has blocks 0 to {site.num_blocks - 1}")
        if self.capability is None:
            return True
        if self.capability > len(queue):
            self.refuse("capability", f"the queue has {len(queue)} blocks")
        return site.block in queue[: self.capability]
