"""MoCLE (Gou et al. 2023, arXiv 2312.12379): an expert chosen by the cluster of a row's prompt, and a universal one."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from loraweave.extend import Count, Positive
from loraweave.extend.recipes import ExpertShape, Recipe, Site
from loraweave.extensions.recipes.cluster_gates import ClusterGate, ClusterReader, ReleasedClusterGate

RELEASED_FEATURES, RELEASED_NOISE = 384, 0.1


@dataclass(frozen=True, kw_only=True)
class Mocle(Recipe):
    """The mixture y = y0 + p E_best(x) + (1 - p) E_universal(x), p the best of `num_experts` by softmax(g c / temperature).

    c is the learned embedding, of `num_features` numbers, of the cluster that a row is in; each site has its own g, and the
    universal expert is one more. Clusters are the centroids of `num_clusters` groups of texts' embeddings, which
    `fit_clusters(model, texts)` finds by k-means before training; a row is in the one nearest to its prompt, all of whose
    tokens have the same weights. The model needs a tokenizer then. With `by_task` the clusters are `tasks` instead, a call
    gives them as task=, and `adapter(task)` is the model of one.

    The paper's are 64 clusters, 4 experts of rank 8 and a temperature of 0.05; it has no size of c, which is 64 here.
    `as_released` is the authors' code where that is another formula: each site has embeddings of its own, 384 wide, and a
    gate with a bias, in training normal noise of the standard deviation 0.1 is added to g c + bias, and the output is
    y0 + p^2 E_best(x) + (1 - p) E_universal(x). Its other sizes are alpha=32, dropout=0.1 and ("q_proj", "v_proj").
    """

    num_experts: Count = 4
    num_clusters: Count = 64
    num_features: Count | None = None
    temperature: Positive = 0.05
    embedder: str = "sentence"
    by_task: bool = False
    as_released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_features is None:
            object.__setattr__(self, "num_features", RELEASED_FEATURES if self.as_released else 64)

    @property
    def needs_tasks(self) -> bool:  # type: ignore[override]
        return self.by_task

    @property
    def num_first_steps(self) -> int:
        # a gate that is sure leaves the universal expert out
        return self.num_experts + 1

    def shape(self, site: Site) -> ExpertShape:
        # the last one is universal
        return ExpertShape((self.rank,) * (self.num_experts + 1))

    def roles(self, site: Site, shape: ExpertShape) -> tuple[Hashable, ...]:
        return (*range(shape.num_experts - 1), "universal")

    def gate(self, site: Site, num_experts: int) -> ClusterGate:
        assert self.num_features is not None
        if not self.as_released:
            return ClusterGate(self.num_features, num_experts, temperature=self.temperature, static=self.by_task)
        return ReleasedClusterGate(
            self.num_features,
            num_experts,
            self._num_clusters,
            temperature=self.temperature,
            noise=RELEASED_NOISE,
            static=self.by_task,
        )

    def reader(self, sites: Sequence[Site]) -> ClusterReader:
        """Make the reader of clusters. Raises UnknownName for an unknown embedder."""
        size = None if self.as_released else self.num_features
        return ClusterReader(self._num_clusters, size, embedder=None if self.by_task else self.embedder)

    @property
    def _num_clusters(self) -> int:
        return len(self.tasks) if self.by_task else self.num_clusters
