"""The clusters that the gates of a recipe look at, found in texts before training."""

from __future__ import annotations

from collections.abc import Sequence

from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.composer.experts.parts import READER
from loraweave.composer.experts.required import require_expert_model
from loraweave.errors import WeightingError
from loraweave.routers.gates.cluster_gate import ClusterReader


def fit_clusters(model: ExpertModel, texts: Sequence[str], *, seed: int = 0) -> ExpertModel:
    """Puts the recipe's clusters where k-means finds them in the embeddings of prompts, and returns the model.

    Clusters and experts are saved together. Raises WeightingError for a recipe without clusters of texts, for what is no
    expert model, and for texts that leave a cluster without a member.
    """
    require_expert_model(model, "fit_clusters()")
    reader = dict(model.gates.items()).get(READER)
    if not isinstance(reader, ClusterReader):
        raise WeightingError(f"recipe {model.recipe.name!r} has no clusters to find in texts; mocle has")
    reader.fit(texts, seed=seed)
    return model
