"""Weights from each adapter's nearness to a text, for each row or for each token that is generated.

Per row it is LoraRetriever's composition (Zhao et al. 2024, arXiv 2402.09997), per token token-level adaptation (Belofsky
2023, arXiv 2311.10847). `similarity` as a search has the same formulas for the scores of a retrieval.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.common.options import Count, Positive
from loraweave.errors import WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._members import Members
from loraweave.routers.tokens._text import Examples, TextRouter, read_expert_texts
from loraweave.types import DEFAULT_TEMPLATE

# LoraRetriever's k
NEAREST = 3
# the right adapter of the pool then has .91 of the weight on prompts that no key has seen, .65 at 0.1, .97 at 0.02
TEMPERATURE = 0.05
REFRESH = 2


class Similarity(TextRouter):
    """A router by cos_e, the cosine of a text's vector and the mean of the vectors of expert e's examples.

    `form` "softmax" makes softmax(cos / `temperature`) over the `nearest` experts (all), "selection" the nearest alone, and
    "mixture" 1/k for each of the `nearest` (3). `per` "row" weighs by each row's prompt; "token" by the prompt and the text
    generated so far, updated after every `refresh` tokens (2, the paper's best).

    The n tokens of a prompt get the prompt's weights, the i-th token after it the weights of the first n + refresh * floor(i
    / refresh) tokens. Without a known prompt (in calls other than generating and scoring) the t-th token of a row gets the
    weights of its first refresh * floor(t / refresh) tokens, at least one. So a token keeps its weights under a cache, and
    generation is the same with and without one. A call embeds a context for each `refresh` of its tokens.

    `examples`: {expert: texts}, as the model will be asked; a Hub, for its records' sample inputs; None, for those of the
    adapters' cards. Sample inputs become prompts by `template`, with the description as the instruction (None: as they are);
    it has to be the template of the prompts to come. `embedder` is a name of `names("embedders")` or an encoder's folder.
    `examples` themselves are not kept. Raises WeightingError that names the experts without examples, and for a form that no
    live mixture has.
    """

    per_expert: ClassVar[Mapping[str, str | None] | None] = {"keys_": None}
    by_expert: ClassVar[tuple[str, ...]] = ("keys_",)
    counts: ClassVar[tuple[str, ...]] = ("nearest",)

    keys_: Tensor

    def __init__(
        self,
        pool: ExpertPool | Members,
        *,
        examples: Examples = None,
        embedder: str = "sentence",
        form: Literal["softmax", "selection", "mixture"] = "softmax",
        nearest: Count | None = None,
        temperature: Positive = TEMPERATURE,
        per: Literal["row", "token"] = "row",
        refresh: Count = REFRESH,
        template: str | None = DEFAULT_TEMPLATE,
    ) -> None:
        super().__init__(pool, embedder)
        self.form, self.nearest, self.temperature, self.template = form, nearest, temperature, template
        self.per, self.refresh = per, refresh
        if form == "selection" and nearest not in (None, 1):
            raise WeightingError(f"nearest is {nearest!r}, but a selection is of 1 expert; 'mixture' takes several")
        self.register_buffer("keys_", torch.empty(0))
        if (expert_pool := Members.pool_of(pool)) is not None:
            texts = read_expert_texts(self.name, expert_pool, examples, template)
            self.require_of_each(texts, "examples")
            self.keys_ = torch.stack([self._key(texts[name]) for name in self.experts])
            self.remember_embedder()

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Raise WeightingError for a value outside its kind, and for the form that only the search of this name has."""
        if options.get("form") == "fusion":
            raise WeightingError(
                "form 'fusion' sums the factors of the adapters apart, with cross terms, and no live mixture does that: "
                "take form='mixture', or compose(..., method='similarity', form='fusion') to merge the adapters of a task so"
            )
        super().check(options)

    def weights_of(self, vectors_ND: Tensor) -> Tensor:
        scores_NE = vectors_ND @ self.keys_.double().T
        count = self._count
        # stable: of equal scores the expert that stands first is nearer
        best_NK = scores_NE.argsort(dim=1, descending=True, stable=True)[:, :count]
        shares_NK = torch.full_like(scores_NE[:, :count], 1 / count)
        if self.form == "softmax":
            shares_NK = (scores_NE.gather(1, best_NK) / self.temperature).softmax(dim=1)
        return torch.zeros_like(scores_NE).scatter(1, best_NK, shares_NK).float()

    @property
    def _count(self) -> int:
        """The number of experts that get a weight."""
        if self.nearest is not None:
            return self.nearest
        return {"selection": 1, "mixture": min(NEAREST, len(self.experts))}.get(self.form, len(self.experts))

    def _key(self, texts: list[str]) -> Tensor:
        return functional.normalize(self.vectors(texts).mean(dim=0), dim=0).float()
