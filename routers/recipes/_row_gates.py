"""Gates that look at the cluster of a row's prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loraweave.errors import ScopeError, WeightingError
from loraweave.hub.embedders._embedder import Embedder, embedder_of
from loraweave.routers.recipes._gate import Call, Gate, Weighing
from loraweave.routers.tokens._call import current_prompts, current_tokenizer, real_tokens
from loraweave.routers.tokens._scores import best_of

# in Call.kept: c_BH of the rows
_OF_ROWS = "embeddings of the rows' clusters"
# in Call.kept: k_B, the places of the rows' clusters
_CLUSTERS = "the rows' clusters"
# texts whose clusters are kept: training meets each several times
NUM_KEPT = 65536


class ClusterGate(Gate):
    """w of the expert that p = softmax(g c / temperature) is highest for is that p, w of the last, universal one 1 - p.

    c_H is the embedding of the row's cluster, which a `ClusterReader` of the model found; g_EH has the other experts.
    """

    # of p in w of the best expert
    power = 1

    def __init__(self, num_features: int, num_experts: int, *, temperature: float, static: bool) -> None:
        super().__init__(num_experts, most=2)
        self.temperature = temperature
        self.static = static
        self.g_EH = nn.Parameter(torch.empty(num_experts - 1, num_features))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """g_EH uniform between -1/sqrt(H) and 1/sqrt(H), as torch draws a linear layer."""
        bound = self.g_EH.shape[1] ** -0.5
        self.g_EH.uniform_(-bound, bound, generator=generator)

    def forward(self, x_BTI: Tensor | None, call: Call) -> Weighing:
        """Raises ScopeError where no call of the whole model has begun."""
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
        """scores_BE before the temperature, without the universal expert."""
        c_BH: Tensor = call.kept[_OF_ROWS]
        return c_BH @ self.g_EH.T


class ReleasedClusterGate(ClusterGate):
    """As `ClusterGate`, by the authors' code: scores are g c + bias with a c_KH of the site's own, in training with normal
    noise of the standard deviation `noise`, and w of the best expert is p^2, that of the universal one 1 - p.

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
        """g_EH and bias_E as torch draws a linear layer, c_KH as it draws an embedding."""
        super().reset(generator)
        bound = self.g_EH.shape[1] ** -0.5
        self.bias_E.uniform_(-bound, bound, generator=generator)
        self.c_KH.normal_(generator=generator)

    def scores(self, call: Call) -> Tensor:
        scores_BE = self.c_KH[call.kept[_CLUSTERS]] @ self.g_EH.T + self.bias_E
        # not where one asks for the weights themselves, outside a step
        if self.training and call.step is not None:
            scores_BE = scores_BE + self.noise * torch.randn_like(scores_BE)
        return scores_BE


class ClusterReader(Gate):
    """Finds each row's cluster before the model runs: its task, or without an `embedder` of texts' nearest centroid.

    c_KH are the clusters' embeddings, which are learned, where `num_features` says their size. With an embedder, `fit` makes
    the centroids of clusters from texts, and a row belongs to the nearest one of its prompt's embedding.
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
        """c_KH normal, as torch draws an embedding."""
        if self.c_KH is not None:
            with torch.no_grad():
                self.c_KH.normal_(generator=generator)

    def fit(self, texts: Sequence[str], *, seed: int = 0) -> None:
        """Puts the centroids where k-means has them for the embeddings of these texts.

        Raises WeightingError where texts are no part of the recipe, and for fewer different texts than clusters, or clusters
        that none of them is nearest to.
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
        found = KMeans(num_clusters, n_init=10, random_state=seed).fit(vectors_ND)
        centroid_KD = torch.from_numpy(found.cluster_centers_).to(self.centroid_KD.dtype)
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
        """The place of the nearest centroid of each text. Raises WeightingError before `fit`, and for another embedder."""
        if not bool(self.count_K.any()):
            raise WeightingError("the gates know no clusters yet: fit_clusters(model, texts) finds them, before fit()")
        if not torch.equal(self.made_by.cpu(), self._digest()):
            raise WeightingError(
                f"the clusters are of another embedder than {self.embedder!r} now is ({self._embedder.id}): fit them again"
            )
        found = self._known
        if missing := [text for text in dict.fromkeys(texts) if text not in found]:
            vectors_ND = torch.from_numpy(np.asarray(self._embedder.embed(missing), dtype=np.float64))
            made = dict(zip(missing, _nearest(vectors_ND, self.centroid_KD.cpu()).tolist(), strict=True))
            # another thread may look at the old one, which stays as it is
            found = found | made
            self._known = found if len(found) <= NUM_KEPT else made
        return [found[text] for text in texts]

    def begin(self, call: Call) -> None:
        """Raises ScopeError for a call whose clusters are not known, and what `clusters` raises."""
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
                "labels of what is given to -100"
            )
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return torch.tensor(self.clusters(texts), device=call.ids_BT.device)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        # clusters of texts by other centroids
        self._known = {}
        super()._load_from_state_dict(*arguments)

    def _digest(self) -> Tensor:
        return torch.tensor(list(hashlib.sha256(self._embedder.id.encode()).digest()), dtype=torch.uint8)


def _nearest(vectors_ND: Tensor, centroid_KD: Tensor) -> Tensor:
    """The place of each vector's nearest centroid; of several, the first."""
    # the vectors' own squares are the same for all
    centroid_KD = centroid_KD.to(vectors_ND.dtype)
    return (centroid_KD.square().sum(dim=1) - 2 * vectors_ND @ centroid_KD.T).argmin(dim=1)


class ConstantGate(Gate):
    """The same w_E for everything, which does not learn."""

    static = True
    w_E: Tensor

    def __init__(self, w_E: Sequence[float]) -> None:
        super().__init__(len(w_E))
        self.given = tuple(w_E)

    def forward(self, x_BTI: Tensor | None, call: Call) -> Weighing:
        w_E = torch.tensor(self.given, dtype=torch.float64)
        return Weighing(
            (w_E if x_BTI is None else w_E.to(x_BTI.device, torch.promote_types(x_BTI.dtype, torch.float32)))[None, None]
        )


# in Call.kept: whether every row was found to have a prompt
_HAVE_PROMPTS = "every row has a prompt"


class RowGate(Gate):
    """Weighs the experts of a site by the mean of its input over the real tokens of a row's prompt.

    What was decided for a row holds for the tokens that follow its prompt. A subclass says how means become weights.
    `padding` counts the prompt's padding in its mean.
    """

    padding = False

    def of_means(self, mean_BI: Tensor, call: Call) -> Weighing:
        """w_B1E and scores_B1E of the call's rows, whose prompts have these means, in fp32 or better."""
        raise NotImplementedError

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        """Raises ScopeError where the site does not see the prompts that the call has."""
        # a site that runs twice in a pass sees other inputs the second time
        place = (self, call.run_of(self))
        # a backward pass that runs layers again needs what the first pass computed, not what it found
        if place in call.kept and torch._C._current_graph_task_id() == -1:
            return of_rows(call.kept[place], len(x_BTI))
        self._require_prompts(x_BTI, call)
        found = self.of_means(prompt_mean(x_BTI, call, padding=self.padding), call)
        call.kept[place] = found
        return found

    def _require_prompts(self, x_BTI: Tensor, call: Call) -> None:
        if call.two_sequences:
            raise ScopeError(
                "a gate that each site has for its rows looks at one sequence, and this model has an encoder and a decoder, "
                "whose tokens differ: take a recipe with one gate for the whole model, or with a gate for each token"
            )
        require_beginning(call)
        tokens = next((values.shape[:2] for values in (call.prompt_BT, call.ids_BT) if values is not None), x_BTI.shape[:2])
        known = current_prompts()
        num_tokens = tokens[1] if known is None else known.mask_BT.shape[1]
        num_rows = tokens[0] if call.num_rows is None else call.num_rows
        if x_BTI.shape[:2] != tokens or x_BTI.shape[1] < num_tokens or len(x_BTI) != num_rows:
            raise ScopeError(
                f"the gate decides by the prompt of a row, {num_rows} rows of {num_tokens} tokens, but its site sees "
                f"{x_BTI.shape[0]} of {x_BTI.shape[1]}: leave such layers out of target_modules, and generate without "
                "prefill_chunk_size"
            )


class ModelGate(Gate):
    """Weighs the experts of all sites alike, by what a row's prompt says before the model has read it."""

    def of_prompts(self, call: Call) -> Weighing:
        """w_B1E and scores_B1E of the rows of a call."""
        raise NotImplementedError

    def begin(self, call: Call) -> None:
        """Decides. Raises ScopeError for a call that goes on from a cache that another one has begun."""
        if self not in call.kept:
            require_beginning(call)
            call.kept[self] = self.of_prompts(call)

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        """Raises ScopeError where no call of the whole model has begun."""
        if self not in call.kept:
            raise ScopeError(
                "the gate decides by the prompts of the whole model's call, and this layer runs outside of one: call the "
                "model with token ids, or generate() from them"
            )
        return of_rows(call.kept[self], len(x_BTI))


def of_rows(weighing: Weighing, num_rows: int) -> Weighing:
    """The weights of rows of which each has several on end, such as beams."""
    w_BTE, scores_BTE = weighing
    copies = num_rows // len(w_BTE)
    if copies <= 1:
        return weighing
    scores_BTE = None if scores_BTE is None else scores_BTE.repeat_interleave(copies, dim=0)
    return Weighing(w_BTE.repeat_interleave(copies, dim=0), scores_BTE)


def require_beginning(call: Call) -> None:
    """Raises ScopeError for a call whose rows began in another one, whose prompts nothing was decided by."""
    if call.follows:
        raise ScopeError(
            "the gate decides by the prompt of a row, which this call with a cache has not: use the model's own generate(), "
            "which keeps what was decided, or call the model with the whole rows"
        )


def prompt_mean(x_BTI: Tensor, call: Call, *, padding: bool = False) -> Tensor:
    """The mean_BI of x over the real tokens of each row's prompt, in fp32 or better; `padding` counts that, too.

    Raises ScopeError for a row that has no such token.
    """
    x_BTI = x_BTI.to(torch.promote_types(x_BTI.dtype, torch.float32))
    counts_BT = call.prompt_BT
    if counts_BT is None:
        return x_BTI.mean(dim=1)
    # one look at the values is enough for all sites
    if _HAVE_PROMPTS not in call.kept:
        if not (has_B := counts_BT.any(dim=1)).all():
            row = has_B.tolist().index(False)
            raise ScopeError(
                f"the gate decides by the prompt of a row, and row {row} has none, as all its tokens have labels: set the "
                "labels of what is given to -100"
            )
        call.kept[_HAVE_PROMPTS] = True
    if padding and call.real_BT is not None:
        counts_BT = counts_BT | ~call.real_BT
    counts_BT1 = counts_BT[..., None]
    # what padding holds may be no number
    return torch.where(counts_BT1, x_BTI, 0).sum(dim=1) / counts_BT1.sum(dim=1)


class ScoredRowGate(RowGate):
    """scores = r mean(x) with r_EI, of which `weights` makes w_B1E."""

    def __init__(self, num_inputs: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.r_EI = nn.Parameter(torch.empty(num_experts, num_inputs))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """r_EI uniform between -1/sqrt(I) and 1/sqrt(I), as torch draws a linear layer."""
        bound = self.r_EI.shape[1] ** -0.5
        self.r_EI.uniform_(-bound, bound, generator=generator)

    def of_means(self, mean_BI: Tensor, call: Call) -> Weighing:
        scores_B1E = (mean_BI.to(self.r_EI.dtype) @ self.r_EI.T)[:, None]
        return Weighing(self.weights(scores_B1E, call), scores_B1E)

    def weights(self, scores_B1E: Tensor, call: Call) -> Tensor:
        """w_B1E."""
        raise NotImplementedError


class DomainGate(ScoredRowGate):
    """w = 1 for the expert with the highest r mean(x), 0 for the others, with the gradient of softmax(r mean(x)); r_EI.

    With `oracle` a row whose domain the call knows has the expert of that place instead.
    """

    def __init__(self, num_inputs: int, num_experts: int, *, oracle: bool = False) -> None:
        super().__init__(num_inputs, num_experts)
        self.oracle = oracle

    def weights(self, scores_B1E: Tensor, call: Call) -> Tensor:
        w_B1E = best_of(scores_B1E, scores_B1E.softmax(dim=-1))
        if self.oracle and call.task_B is not None:
            own_B1E = nn.functional.one_hot(call.task_B.clamp(min=0), self.num_experts).to(w_B1E)[:, None]
            w_B1E = torch.where((call.task_B >= 0)[:, None, None], own_B1E, w_B1E)
        return w_B1E


class FactorGate(ScoredRowGate):
    """w = [softmax(r_a h), softmax(r_b h)] with h = mean(x) over a row's prompt: of E factors a, and of E factors b.

    They are scores, of which a form chooses the best. r_EI is that of the factors a, and then of b.
    """

    def __init__(self, num_inputs: int, num_factors: int, *, padding: bool = False) -> None:
        super().__init__(num_inputs, 2 * num_factors)
        self.padding = padding

    def weights(self, scores_B1E: Tensor, call: Call) -> Tensor:
        of_a, of_b = scores_B1E.chunk(2, dim=-1)
        return torch.cat([of_a.softmax(dim=-1), of_b.softmax(dim=-1)], dim=-1)


class MeanGate(ScoredRowGate):
    """w = softmax(r mean(x)) with r_EI."""

    def weights(self, scores_B1E: Tensor, call: Call) -> Tensor:
        return scores_B1E.softmax(dim=-1)


class TaskGate(Gate):
    """w = softmax(g e_task) with an embedding e_KD of each of K tasks and g_ED; in fp32 or better."""

    static = True

    def __init__(self, num_tasks: int, num_features: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.e_KD = nn.Parameter(torch.empty(num_tasks, num_features))
        self.g_ED = nn.Parameter(torch.empty(num_experts, num_features))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """e_KD normal, g_ED uniform between -1/sqrt(D) and 1/sqrt(D), as torch draws an embedding and a linear layer."""
        bound = self.g_ED.shape[1] ** -0.5
        self.e_KD.normal_(generator=generator)
        self.g_ED.uniform_(-bound, bound, generator=generator)

    def forward(self, x_BTI: Tensor | None, call: Call) -> Weighing:
        """Raises ScopeError for a call whose tasks are not known."""
        if call.task_B is None:
            raise ScopeError(
                "the gate looks at the task of each row, and this call has none: give task=..., one for each row"
            )
        scores_B1E = (self.e_KD[call.task_B] @ self.g_ED.T)[:, None]
        return Weighing(scores_B1E.softmax(dim=-1), scores_B1E)
