"""A classifier of texts that says which adapter answers: the baseline that every learned router has to beat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from loraweave.common.chat import prompt_texts
from loraweave.common.options import Positive, Share
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._members import Members
from loraweave.routers.tokens._scores import top_p_of_softmax
from loraweave.routers.tokens._text import Examples, TextRouter, read_expert_texts, read_prompts
from loraweave.types import DEFAULT_TEMPLATE


class Logistic(TextRouter):
    """A router by p = softmax(W u + b) of a text's vector u, fitted by scikit-learn's LogisticRegression to experts' texts.

    `form` "selection" gives the likeliest expert 1, "probabilities" each expert p. "top_p" has the weights of DLP-LoRA
    (Zhang and Li 2024, arXiv 2410.01497): softmax(p) over the fewest experts whose p sum to at least `top_p`, .6 as in the
    released test, and 0 for the others. The softmax of probabilities follows the paper and leaves the chosen experts nearly
    equal weights; the paper's p comes from a small transformer trained on the texts.

    `inverse_penalty` is scikit-learn's C: |W|^2 / (2 C) is added to the summed loss of all texts, so that a larger C gives
    surer predictions. The fit is the optimum and has no randomness.

    `examples`, `template` and `embedder` are those of router `similarity`; if the cards have no sample inputs either, call
    `fit` first. Raises WeightingError that names the experts without examples.
    """

    by_expert: ClassVar[tuple[str, ...]] = ("coefficients_", "intercepts_")

    coefficients_: Tensor
    intercepts_: Tensor

    def __init__(
        self,
        pool: ExpertPool | Members,
        *,
        examples: Examples = None,
        embedder: str = "sentence",
        form: Literal["selection", "probabilities", "top_p"] = "selection",
        top_p: Share = 0.6,
        inverse_penalty: Positive = 10.0,
        template: str | None = DEFAULT_TEMPLATE,
    ) -> None:
        super().__init__(pool, embedder)
        self.form, self.top_p, self.inverse_penalty, self.template = form, top_p, inverse_penalty, template
        self.register_buffer("coefficients_", torch.empty(0))
        self.register_buffer("intercepts_", torch.empty(0))
        if (expert_pool := Members.pool_of(pool)) is not None:
            texts = read_expert_texts(self.name, expert_pool.subset(self.chosen), examples, template)
            if examples is not None or any(texts.values()):
                self._learn(texts)

    def fit(self, engine: Any, dataset: Any) -> Self:
        """Learn which expert a text is for, and return self.

        `dataset` is {expert: rows, a Task, or prompts}, or rows that name their "expert", as for `Composer.fit`; `engine` a
        Composer with the router's pool. Raises InvalidTask for rows that name no expert, WeightingError that names the
        experts without examples, UnknownExpert for others.
        """
        self.require_engine(engine)
        self._learn({name: prompt_texts(engine.tokenizer, prompts) for name, prompts in read_prompts(dataset).items()})
        return self

    @property
    def chosen(self) -> tuple[str, ...]:
        """The experts that a text can be routed to."""
        return self.experts

    def weights_of(self, vectors_ND: Tensor) -> Tensor:
        logits_NE = vectors_ND @ self.coefficients_.double().T + self.intercepts_.double()
        if self.form == "probabilities":
            return logits_NE.softmax(dim=1).float()
        if self.form == "top_p":
            p_NE = top_p_of_softmax(logits_NE, self.top_p)
            return p_NE.masked_fill(p_NE == 0, -math.inf).softmax(dim=1).float()
        return torch.zeros_like(logits_NE).scatter(1, logits_NE.argmax(dim=1, keepdim=True), 1.0).float()

    def _learn(self, texts: Mapping[str, Sequence[str]]) -> None:
        self.require_of_each(texts, "examples", self.chosen)
        of_expert = [self.vectors(texts[name]) for name in self.chosen]
        expert_N = torch.tensor([place for place, rows in enumerate(of_expert) for _ in rows])
        self.coefficients_, self.intercepts_ = _fit(torch.cat(of_expert), expert_N, self.inverse_penalty)
        self.remember_embedder()


def _fit(vectors_ND: Tensor, expert_N: Tensor, inverse_penalty: float) -> tuple[Tensor, Tensor]:
    """Return W_ED and b_E fitted to vectors_ND, where expert_N is the index of each text's expert."""
    from sklearn.linear_model import LogisticRegression

    num_experts = int(expert_N.max()) + 1
    if num_experts == 1:
        return torch.zeros(1, vectors_ND.shape[1]), torch.zeros(1)
    # to the optimum, so that the order of the experts and of the texts does not matter
    model = LogisticRegression(C=inverse_penalty, max_iter=10_000, tol=1e-8)
    model.fit(vectors_ND.numpy(), expert_N.numpy())
    found_ED, found_E = torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()
    if num_experts == 2:
        # scikit-learn has one row then, of the second against the first
        found_ED = torch.cat([torch.zeros_like(found_ED), found_ED])
        found_E = torch.cat([torch.zeros_like(found_E), found_E])
    return found_ED, found_E
