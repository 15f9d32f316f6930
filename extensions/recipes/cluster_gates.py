"""Gates that weigh a row by the cluster of its prompt, and the reader that finds the clusters of a call's rows.

The number of clusters of the training texts says how many experts to train, as in HydraLoRA's paper.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loraweave import ScopeError, WeightingError
from loraweave.extend import is_whole
from loraweave.extend.hubs import Embedder, embedder_of
from loraweave.extend.recipes import Call, ExpertModel, Gate, Weighing, draw_linear, require_expert_model
from loraweave.extend.routing import current_tokenizer, real_tokens
from loraweave.extensions.recipes.row_gates import of_rows, require_beginning

# in Call.kept: c_BH of the rows
_OF_ROWS = "embeddings of the rows' clusters"

# in Call.kept: k_B, the places of the rows' clusters
_CLUSTERS = "the rows' clusters"

# texts whose clusters are kept: training meets each several times
NUM_KEPT = 65536


class ClusterGate(Gate):
    """A gate by clusters: the expert of the highest p = softmax(g c / temperature) weighs p, the last, universal one 1 - p.

    c_H is the embedding, of H = `num_features` values, of the row's cluster, which the model's `ClusterReader` finds. g_EH
    has a row for each expert but the universal one. `static` says that the task alone decides, without any input.
    """

    # exponent of p in the weight of the best expert
    power = 1

    def __init__(self, num_features: int, num_experts: int, *, temperature: float, static: bool) -> None:
        super().__init__(num_experts, most=2)
        self.temperature = temperature
        self.static = static
        self.g_EH = nn.Parameter(torch.empty(num_experts - 1, num_features))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw g_EH uniformly between -1/sqrt(H) and 1/sqrt(H), as torch draws a linear layer."""
        draw_linear(self.g_EH, generator)

    def forward(self, x_BTI: Tensor | None, call: Call) -> Weighing:
        """Return the weights of each row's cluster. Raises ScopeError where no call of the whole model has begun."""
        if _CLUSTERS not in call.kept:
            raise ScopeError(
                "the gate looks at the clusters of the rows of the whole model's call, and this layer runs outside of one: "
                "call the model itself, or generate() with it"
            )
        p_BE = (self.scores(call) / self.temperature).softmax(dim=-1)
        best = p_BE.max(dim=-1, keepdim=True)
        chosen_BE = torch.zeros_like(p_BE).scatter(-1, best.indices, best.values**self.power)
        w_B1E = torch.cat([chosen_BE, 1 - best.values], dim=-1)[:, None]
        return of_rows(Weighing(w_B1E), len(w_B1E) if x_BTI is None else len(x_BTI))

    def scores(self, call: Call) -> Tensor:
        """Return scores_BE of the rows' clusters, before the temperature and without the universal expert."""
        c_BH: Tensor = call.kept[_OF_ROWS]
        return c_BH @ self.g_EH.T


class ReleasedClusterGate(ClusterGate):
    """`ClusterGate` as in the authors' code: the best expert weighs p^2, the universal one 1 - p.

    Scores are g c + bias with a c_KH of the site's own, in training with normal noise of the standard deviation `noise`.
    Needs a `ClusterReader` without embeddings.
    """

    power = 2

    def __init__(
        self, num_features: int, num_experts: int, num_clusters: int, *, temperature: float, noise: float, static: bool
    ) -> None:
        super().__init__(num_features, num_experts, temperature=temperature, static=static)
        self.noise = noise
        self.c_KH = nn.Parameter(torch.empty(num_clusters, num_features))
        self.bias_E = nn.Parameter(torch.empty(num_experts - 1))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw g_EH and bias_E as torch draws a linear layer, c_KH as it draws an embedding."""
        super().reset(generator)
        bound = self.g_EH.shape[1] ** -0.5
        self.bias_E.uniform_(-bound, bound, generator=generator)
        self.c_KH.normal_(generator=generator)

    def scores(self, call: Call) -> Tensor:
        scores_BE = self.c_KH[call.kept[_CLUSTERS]] @ self.g_EH.T + self.bias_E
        # noise is left out when weights are requested outside a step
        if self.training and call.step is not None:
            scores_BE = scores_BE + self.noise * torch.randn_like(scores_BE)
        return scores_BE


class ClusterReader(Gate):
    """A reader that finds each row's cluster before the model runs: its task, or with an `embedder` the nearest centroid.

    c_KH are learned embeddings of the K clusters, of H = `num_features` values; None makes none. With an embedder, `fit`
    makes the centroids from texts, and a row's cluster is the centroid nearest to its prompt's embedding.
    """

    centroid_KD: Tensor
    count_K: Tensor
    made_by: Tensor

    def __init__(self, num_clusters: int, num_features: int | None, *, embedder: str | None) -> None:
        super().__init__(num_clusters)
        self.embedder = embedder
        self.static = embedder is None
        self.c_KH = None if num_features is None else nn.Parameter(torch.empty(num_clusters, num_features))
        self._known: dict[str, int] = {}
        if embedder is not None:
            self.register_buffer("centroid_KD", torch.zeros(num_clusters, self._embedder.dim))
            self.register_buffer("count_K", torch.zeros(num_clusters, dtype=torch.long))
            self.register_buffer("made_by", torch.zeros(32, dtype=torch.uint8))

    @cached_property
    def _embedder(self) -> Embedder:
        assert self.embedder is not None
        return embedder_of(self.embedder)

    def reset(self, generator: torch.Generator) -> None:
        """Draw c_KH from the normal distribution, as torch draws an embedding."""
        if self.c_KH is not None:
            with torch.no_grad():
                self.c_KH.normal_(generator=generator)

    def fit(self, texts: Sequence[str], *, seed: int = 0) -> None:
        """Set the centroids to those that k-means finds for the embeddings of these texts.

        Raises WeightingError for a recipe that takes no texts, for fewer different texts than clusters, and for a cluster
        that no text is nearest to.
        """
        from sklearn.cluster import KMeans

        num_clusters = self.num_experts
        if self.embedder is None:
            raise WeightingError(
                "the clusters are the tasks of the rows, which no texts are fitted to: make the recipe without by_task"
            )
        vectors_ND = np.asarray(self._embedder.embed(list(texts)), dtype=np.float64)
        num_different = len(np.unique(vectors_ND, axis=0)) if len(texts) else 0
        if num_different < num_clusters:
            raise WeightingError(
                f"{num_clusters} clusters need at least as many different texts, and {num_different} were given, so that "
                "some cluster had no member: give more texts, or a smaller num_clusters"
            )
        kmeans = KMeans(num_clusters, n_init=10, random_state=seed).fit(vectors_ND)
        centroid_KD = torch.from_numpy(kmeans.cluster_centers_).to(self.centroid_KD.dtype)
        count_K = _nearest(torch.from_numpy(vectors_ND), centroid_KD).bincount(minlength=num_clusters)
        if not bool(count_K.all()):
            raise WeightingError(
                f"{int((count_K == 0).sum())} of {num_clusters} clusters have no member among the {len(texts)} texts: take "
                "a smaller num_clusters"
            )
        self._known = {}
        self.centroid_KD.copy_(centroid_KD)
        self.count_K.copy_(count_K)
        self.made_by.copy_(self._digest())

    def clusters(self, texts: Sequence[str]) -> list[int]:
        """Return the index of each text's nearest centroid. Raises WeightingError before `fit`, and for another embedder."""
        if not bool(self.count_K.any()):
            raise WeightingError("the gates know no clusters yet: fit_clusters(model, texts) finds them, before fit()")
        if not torch.equal(self.made_by.cpu(), self._digest()):
            raise WeightingError(
                f"the clusters are of another embedder than {self.embedder!r} now is ({self._embedder.id}): fit them again"
            )
        known = self._known
        if missing := [text for text in dict.fromkeys(texts) if text not in known]:
            vectors_ND = torch.from_numpy(np.asarray(self._embedder.embed(missing), dtype=np.float64))
            made = dict(zip(missing, _nearest(vectors_ND, self.centroid_KD.cpu()).tolist(), strict=True))
            # a new mapping, since another thread may be reading the old one
            known = known | made
            self._known = known if len(known) <= NUM_KEPT else made
        return [known[text] for text in texts]

    def begin(self, call: Call) -> None:
        """Store the clusters of a call's rows in `call.kept`. Raises ScopeError if unknown, and what `clusters` raises."""
        if _CLUSTERS not in call.kept:
            k_B = call.kept[_CLUSTERS] = self._of_tasks(call) if self.embedder is None else self._of_prompts(call)
            if self.c_KH is not None:
                call.kept[_OF_ROWS] = self.c_KH[k_B]

    def _of_tasks(self, call: Call) -> Tensor:
        if call.task_B is None:
            raise ScopeError("the clusters are the tasks of the rows, and none were given: call with task=..., one for each")
        return call.task_B

    def _of_prompts(self, call: Call) -> Tensor:
        require_beginning(call)
        tokenizer = current_tokenizer()
        if call.ids_BT is None or tokenizer is None:
            raise ScopeError(
                "the gate decides by the texts of prompts, which it reads with a tokenizer from token ids: make the model "
                "with lw.experts(..., tokenizer=...), and call it with input_ids"
            )
        mask_BT = torch.ones_like(call.ids_BT) if call.prompt_BT is None else call.prompt_BT
        rows = real_tokens(call.ids_BT, mask_BT)
        if not all(rows):
            raise ScopeError(
                f"the gate decides by the prompt of a row, and row {list(map(bool, rows)).index(False)} has none: set the "
                "labels of the prompt's tokens to -100"
            )
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return torch.tensor(self.clusters(texts), device=call.ids_BT.device)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        # the kept clusters were by other centroids
        self._known = {}
        super()._load_from_state_dict(*arguments)

    def _digest(self) -> Tensor:
        return torch.tensor(list(hashlib.sha256(self._embedder.id.encode()).digest()), dtype=torch.uint8)


def fit_clusters(model: ExpertModel, texts: Sequence[str], *, seed: int = 0) -> ExpertModel:
    """Fit the recipe's clusters by k-means to the embeddings of prompts; return the model.

    Clusters and experts are saved together. Raises WeightingError for a recipe without clusters of texts, for anything
    but an expert model, and for texts that leave a cluster without a member.
    """
    require_expert_model(model, "fit_clusters()")
    reader = model.reader
    if not isinstance(reader, ClusterReader):
        raise WeightingError(f"recipe {model.recipe.name!r} has no clusters to find in texts; mocle has")
    reader.fit(texts, seed=seed)
    return model


def _nearest(vectors_ND: Tensor, centroid_KD: Tensor) -> Tensor:
    """Return the index of each vector's nearest centroid (N), the first of several equally near."""
    # the vectors' own squares are the same for all
    centroid_KD = centroid_KD.to(vectors_ND.dtype)
    return (centroid_KD.square().sum(dim=1) - 2 * vectors_ND @ centroid_KD.T).argmin(dim=1)


# a silhouette looks at every pair of texts
MOST_TEXTS = 5000
WORD = r"(?u)\b\w+\b"


def experts_for(texts: Sequence[str], *, most: int = 10, seed: int = 0) -> int:
    """Return how many experts to train: the number of k-means clusters of the texts' TF-IDF with the best mean silhouette.

    It is from 2 to `most`, and less than the number of different texts that have a word; 1 for fewer than three such texts.
    Of more than 5000, a sample is drawn by `seed`. The paper finds the number by k-means; the silhouette is our measure.
    Raises WeightingError for a `most` below 2.
    """
    if not is_whole(most, 2):
        raise WeightingError(f"most is {most!r}: it is the largest number of experts to try, a whole number of at least 2")
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import silhouette_score

    different = sorted({text for text in texts if re.search(WORD, text)})
    if len(different) > MOST_TEXTS:
        different = Random(seed).sample(different, MOST_TEXTS)
    features = TfidfVectorizer(token_pattern=WORD).fit_transform(different) if len(different) > 2 else None
    best, num_clusters = -1.0, 1
    for number in range(2, min(most, len(different) - 1) + 1):
        clusters = KMeans(number, n_init=10, random_state=seed).fit_predict(features)
        if len(set(clusters.tolist())) == number and (score := silhouette_score(features, clusters)) > best:
            best, num_clusters = score, number
    return num_clusters
