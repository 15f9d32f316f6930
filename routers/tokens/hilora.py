"""HiLoRA (Han et al. 2025, arXiv 2510.12266): a text gets so many components of each LoRA, and each token the strongest.

The experts are the components of rank 1 that `ExpertPool.rank_one` makes; those of one LoRA have its name on their cards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.common.options import Count, Positive, Share
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._members import Members
from loraweave.routers.tokens._text import Examples, TextRouter, TextWeights, read_expert_texts
from loraweave.routers.tokens.spectr import Spectr
from loraweave.types import DEFAULT_TEMPLATE

NEAREST = 3
FRACTION = 0.4
# ours, as are the Gaussians' form and how a budget is rounded: what is public of the paper is its abstract and its reviews,
# which name the likelihoods, m = 20 samples, k = 3, 40 %, a multinomial draw and a normalisation of the variance
ENOUGH = 0.9
SHRINKAGE = 0.5


class Hilora(TextRouter):
    """Of LoRA g, the n_g components that change the token most have weight min(1, sqrt(R / n)), all others 0.

    A text with vector u has the likelihood N(u; mean_g, diag(var_g)) of each LoRA's example texts; var_g lies halfway
    between their own variance and that of all LoRAs. p = softmax(log likelihood / `temperature`) over LoRAs; the likeliest
    ones are taken, at least `nearest` (3) and until they hold 0.9 of p. Of all components that the taken ones have, a
    `fraction` (0.4) is shared out among them by p, with the largest remainders; no LoRA gets more than it has. n_g is that
    share. `temperature` is by default the root of the size of u: about how much a text's own log likelihood varies.

    At a token x of a layer the components of g with the largest |b a x| count. n is how many count there, R the most that
    one of the taken LoRAs has in the layer: so a text that is clearly of one LoRA gets that LoRA as it was trained. In a
    pool that is not of rank 1, each expert is a LoRA of one component.

    `examples`: {LoRA: texts}, a Hub, or None for the cards' sample inputs; `embedder` and `template` are those of router
    `similarity`. Raises WeightingError that names the LoRAs without examples.
    """

    by_expert: ClassVar[tuple[str, ...]] = ("lora_",)

    lora_: Tensor
    centres_: Tensor
    spreads_: Tensor

    def __init__(
        self,
        pool: ExpertPool | Members,
        *,
        examples: Examples = None,
        embedder: str = "sentence",
        nearest: Count = NEAREST,
        fraction: Share = FRACTION,
        temperature: Positive | None = None,
        template: str | None = DEFAULT_TEMPLATE,
    ) -> None:
        super().__init__(pool, embedder)
        self.nearest, self.fraction, self.temperature, self.template = nearest, fraction, temperature, template
        self.spectr = Spectr(pool)
        self.register_buffer("lora_", torch.empty(0, dtype=torch.long))
        self.register_buffer("centres_", torch.empty(0))
        self.register_buffer("spreads_", torch.empty(0))
        if (given := Members.pool_of(pool)) is not None:
            loras = [str(given[name].card.get("part_of", name)) for name in given.names]
            places = {lora: place for place, lora in enumerate(dict.fromkeys(loras))}
            self.lora_ = torch.tensor([places[lora] for lora in loras])
            firsts = ExpertPool({lora: given[given.names[loras.index(lora)]] for lora in places})
            texts = read_expert_texts(self.name, firsts, examples, template)
            self.require_of_each(texts, "examples", firsts.names)
            self._learn([self.vectors(texts[lora]) for lora in places])

    def weights_of(self, vectors_ND: Tensor) -> Tensor:
        """n_NE: how many components of its LoRA each expert is one of, for texts with these vectors."""
        p_NG = self.probabilities(vectors_ND)
        size_G = torch.bincount(self.lora_, minlength=len(self.centres_)).double()
        best_NG = p_NG.argsort(dim=1, descending=True, stable=True)
        sorted_NG = p_NG.gather(1, best_NG)
        place_G = torch.arange(len(size_G), device=p_NG.device)
        taken_NG = (place_G < self.nearest) | (sorted_NG.cumsum(dim=1) - sorted_NG < ENOUGH)
        taken_NG = torch.zeros_like(taken_NG).scatter(1, best_NG, taken_NG)
        p_NG = p_NG * taken_NG
        budget_N1 = (self.fraction * (size_G * taken_NG).sum(dim=1, keepdim=True)).round().clamp_min(1)
        due_NG = budget_N1 * p_NG / p_NG.sum(dim=1, keepdim=True)
        left_N1 = (budget_N1 - due_NG.floor().sum(dim=1, keepdim=True)).round()
        remainder_NG = due_NG - due_NG.floor()
        order_NG = remainder_NG.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        count_NG = torch.minimum(due_NG.floor() + (order_NG < left_N1), size_G)
        return count_NG[:, self.lora_].float()

    def probabilities(self, vectors_ND: Tensor) -> Tensor:
        """p_NG of the LoRAs, in the order of their first components."""
        mean_GD, variance_GD = self.centres_.double(), self.spreads_.double()
        distance_NGD = (vectors_ND[:, None] - mean_GD).square() / variance_GD
        log_NG = -0.5 * (distance_NGD.sum(dim=2) + variance_GD.log().sum(dim=1))
        return (log_NG / (self.temperature or math.sqrt(mean_GD.shape[1]))).softmax(dim=1)

    def begin(self, model: nn.Module, arguments: Mapping[str, Any]) -> _OfCall:  # type: ignore[override]
        """Raises what `TextRouter.begin` raises."""
        return _OfCall(self, super().begin(model, arguments))

    def chosen(self, scores_BTE: Tensor, count_BTE: Tensor, member_GM: Tensor) -> Tensor:
        """w_BTE of scores, -inf where an expert leaves the layer alone, and of how many components of each LoRA count.

        `member_GM` are the experts of each LoRA; those of a smaller one are followed by E.
        """
        padded_BTE = functional.pad(scores_BTE, (0, 1), value=-math.inf)
        scores_BTGM = padded_BTE[..., member_GM]
        count_BTG1 = functional.pad(count_BTE, (0, 1))[..., member_GM].amax(dim=-1, keepdim=True)
        place_BTGM = scores_BTGM.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        there_BTGM = (scores_BTGM > -math.inf) & (count_BTG1 > 0)
        active_BTGM = there_BTGM & (place_BTGM < count_BTG1)
        most_BT = there_BTGM.sum(dim=-1).amax(dim=-1)
        strength_BT = (most_BT / active_BTGM.sum(dim=(-1, -2)).clamp_min(1)).sqrt().clamp_max(1.0)
        w_BTGM = active_BTGM * strength_BT[..., None, None]
        # every expert is a member once, and the place that pads the table is cut off
        w_BTE = torch.zeros_like(padded_BTE).index_copy(-1, member_GM.flatten(), w_BTGM.flatten(-2).to(padded_BTE.dtype))
        return w_BTE[..., :-1]

    def _learn(self, of_lora: list[Tensor]) -> None:
        variance_GD = torch.stack([rows_ND.var(dim=0, correction=0) for rows_ND in of_lora])
        shared_D = variance_GD.mean(dim=0)
        # a LoRA of one text, or texts that are all alike in a direction, would be certain of it
        floor = float(shared_D.mean()) * 1e-3 + torch.finfo(torch.float32).eps
        self.centres_ = torch.stack([rows_ND.mean(dim=0) for rows_ND in of_lora]).float()
        self.spreads_ = (SHRINKAGE * variance_GD + (1 - SHRINKAGE) * shared_D + floor).float()
        self.remember_embedder()


class _OfCall:
    """Weights of one call, from how many components of each LoRA its rows have."""

    def __init__(self, router: Hilora, counts: TextWeights) -> None:
        self._router = router
        self._counts = counts
        own = [(router.lora_ == place).nonzero()[:, 0] for place in range(len(router.centres_))]
        self._member_GM = nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=len(router.lora_))

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        count_BTE = self._counts.weights(x_BTI, layer)
        return self._router.chosen(self._router.spectr.scores(x_BTI, layer), count_BTE, self._member_GM)
