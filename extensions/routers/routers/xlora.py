"""X-LoRA (Buehler & Buehler 2024, arXiv 2402.07148): a small network reads the base's last hidden state of each token."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from loraweave import ExpertPool, ScopeError, WeightingError
from loraweave.extend import Count, Positive, Range, Rate
from loraweave.extend.routing import BesideCache, LearnedRouter, Members, asked_of_head, top_k_softmax, under
from loraweave.extensions.routers.last_hidden import last_hidden

if TYPE_CHECKING:
    from transformers import DynamicCache


Softmax = Literal["top_k", "all", "twice", "none"]

# the most bytes of hidden states kept in one training
KEPT_BYTES = 2**29


class Xlora(LearnedRouter):
    """A router with w_t = global_scaling * softmax of head(h_t) / temperature, h_t the base's last hidden state of token t.

    The head is Linear(hidden_size, experts) with a bias; `depth` d puts d - 1 times Linear(.., size), ReLU, dropout before.
    With `layerwise` it gives every layer logits of its own, in the order of `layers`; else all layers share one set.

    `top_k` experts count for each token, None is all, and `softmax` says over which logits: "top_k" over those alone, so
    that the weights sum to global_scaling; "all" over all before the others are set to 0, so that they sum to less; "twice"
    that, and once more over the kept weights, which levels them; "none": the logits are the weights. peft's XLoraConfig is
    "all" as it comes, "top_k" (at temperature 1) with enable_softmax_topk alone, "twice" with both, "none" with neither.
    An expert that leaves a layer alone takes no part in its softmax; "twice" leaves out what the first softmax rounds to 0.

    The state is the base's, or with a `scaling_pass_value` v of the base with each adapter at weight v * global_scaling.
    `as_peft` applies the choice to these equal values, too: the `top_k` adapters that torch.topk picks among them on that
    device keep theirs, the others have 0, and with "top_k" or "twice" each keeps global_scaling / their number instead. It
    also leaves a logit of exactly 0 out of the softmax "top_k". Routers read from peft's folders have it. `hidden_size` is
    by default the size that inputs and outputs of the pool's layers have most often.

    Every call of the model is preceded by a pass of its tokens through the base. Under a key-value cache that pass has a
    cache of its own beside it, so that generation with a cache is generation without. While it trains, the states of each
    row are kept, up to 512 MiB, and a row that comes again needs no such pass.
    """

    counts: ClassVar[tuple[str, ...]] = ("top_k",)

    def __init__(
        self,
        pool: ExpertPool | Members,
        *,
        layerwise: bool = False,
        depth: Count = 1,
        size: Count = 2048,
        dropout: Rate = 0.2,
        top_k: Count | None = None,
        temperature: Positive = 1.0,
        softmax: Softmax = "top_k",
        scaling_pass_value: float = 0.0,
        global_scaling: Positive | Annotated[float, Range(below=0)] = 1.0,
        as_peft: bool = False,
        hidden_size: Count | None = None,
    ) -> None:
        super().__init__(pool)
        self.layerwise = layerwise
        self.depth = depth
        self.size = size
        self.dropout = dropout
        self.top_k = top_k
        self.temperature = temperature
        self.softmax = softmax
        self.scaling_pass_value = scaling_pass_value
        self.global_scaling = global_scaling
        self.as_peft = as_peft
        self.hidden_size = self.members.most_frequent_size if hidden_size is None else hidden_size
        # what sums to something else says so
        if softmax == "none" or global_scaling != 1 or (softmax == "all" and top_k is not None):
            self.simplex = False
        self.head = self._make_head()
        self._beside: BesideCache[DynamicCache] = BesideCache(self.name)
        # layers that share logits and have the same experts share weights, too
        groups = [(name if layerwise else "", self.members.layers[name].experts) for name in self.layers]
        self._groups = list(dict.fromkeys(groups))
        self._group_of = {name: self._groups.index(group) for name, group in zip(self.layers, groups, strict=True)}

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        raise ScopeError(
            f"router {self.name!r} reads the last hidden state of the base, not the input of layer {layer!r}: "
            "activate() it in a Composer, whose calls begin with it"
        )

    def begin(self, model: nn.Module, arguments: Mapping[str, Any]) -> _OfCall:
        """Return the weights of one call. Raises WeightingError for another hidden size, and the errors of `last_hidden`."""
        hidden_BTD = self._hidden(model, arguments)
        if hidden_BTD.shape[2] != self.hidden_size:
            raise WeightingError(
                f"router {self.name!r} was made for hidden states of size {self.hidden_size}, but {type(model).__name__}'s "
                f"have {hidden_BTD.shape[2]}: make it with hidden_size={hidden_BTD.shape[2]}"
            )
        place = hidden_BTD.device
        parameter = next(self.head.parameters())
        if parameter.device != place:
            with torch.inference_mode(False):
                self.to(place)
        with torch.autocast(place.type, enabled=False):
            logits_BTLE = self.head(hidden_BTD.to(parameter.dtype)).unflatten(2, (-1, len(self.experts)))
            scores_BTGE = logits_BTLE.expand(-1, -1, len(self._groups), -1)
            absent_GE = torch.ones(len(self._groups), len(self.experts), dtype=torch.bool)
            for place_G, (_, present) in enumerate(self._groups):
                absent_GE[place_G, list(present)] = False
            w_BTGE = self._choose(scores_BTGE, absent_GE.to(place))
        return _OfCall(self, scores_BTGE, w_BTGE, arguments.get("logits_to_keep"))

    def _choose(self, scores_BTGE: Tensor, absent_GE: Tensor) -> Tensor:
        """Return w_BTGE before the global scaling, G groups of layers; absent_GE marks experts that leave a group alone."""
        some_BTGE = scores_BTGE.masked_fill(absent_GE, -torch.inf)
        if self.softmax == "top_k" and not self.as_peft:
            return top_k_softmax(some_BTGE, self.top_k, self.temperature)
        over_all = self.softmax in ("all", "twice")
        w_BTGE = (some_BTGE / self.temperature).softmax(dim=-1) if over_all else some_BTGE
        num_kept = len(self.experts) if self.top_k is None else self.top_k
        best = w_BTGE.topk(num_kept, dim=-1)
        left_out = torch.ones_like(w_BTGE, dtype=torch.bool).scatter(-1, best.indices, False) | absent_GE
        if self._softens_chosen:
            left_out = left_out | (w_BTGE == 0)
            temperature = 1.0 if over_all else self.temperature
            w_BTGE = (w_BTGE / temperature).masked_fill(left_out, -torch.inf).softmax(dim=-1)
        return w_BTGE.masked_fill(left_out, 0.0)

    @property
    def _softens_chosen(self) -> bool:
        """True if a softmax is taken of the chosen experts alone."""
        return self.softmax in ("top_k", "twice")

    def _hidden(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        """Return hidden_BTD of a call; in training, states kept from an earlier step are used again."""
        step = self.step
        if step is None or model.training or step.mask_BT.shape[0] != step.rows_B.shape[0]:
            return self._read(model, arguments)
        keys, mask_BT = [(self, number) for number in step.rows_B.tolist()], step.mask_BT.bool()
        if all(key in step.kept for key in keys):
            known_ND = torch.cat([step.kept[key] for key in keys])
            hidden_BTD = known_ND.new_zeros(*mask_BT.shape, known_ND.shape[1])
            hidden_BTD[mask_BT] = known_ND
            return hidden_BTD
        hidden_BTD = self._read(model, {**arguments, "use_cache": False})
        for key, row_TD, mask_T in zip(keys, hidden_BTD, mask_BT, strict=True):
            num_bytes = step.kept.get(self, 0) + row_TD[mask_T].nbytes
            if key not in step.kept and num_bytes <= KEPT_BYTES:
                step.kept[key], step.kept[self] = row_TD[mask_T], num_bytes
        return hidden_BTD

    def _read(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
        weights = self._of_scaling_pass(next(model.parameters()).device)
        with under(weights) if any(weights.values()) else nullcontext():
            return last_hidden(self.name, model, arguments, self._beside)

    def _of_scaling_pass(self, device: torch.device) -> dict[str, float]:
        """Return {expert: weight} for the extra pass that computes the hidden states."""
        value, num_experts = self.scaling_pass_value, len(self.experts)
        chosen = set(range(num_experts))
        if self.as_peft and value:
            if self.top_k is not None:
                chosen = set(torch.full((num_experts,), value, device=device).topk(self.top_k).indices.tolist())
            if self._softens_chosen:
                value = 1 / len(chosen)
        weight = value * self.global_scaling
        return {expert: weight if place in chosen else 0.0 for place, expert in enumerate(self.experts)}

    def _make_head(self) -> nn.Sequential:
        sizes = [self.hidden_size, *[self.size] * (self.depth - 1)]
        inner: list[nn.Module] = []
        for num_inputs, num_outputs in pairwise(sizes):
            inner += [nn.Linear(num_inputs, num_outputs), nn.ReLU(), nn.Dropout(self.dropout)]
        num_sets = len(self.layers) if self.layerwise else 1
        return nn.Sequential(*inner, nn.Linear(sizes[-1], num_sets * len(self.experts)))


class _OfCall:
    """The weights of one call's tokens by an X-LoRA; `logits_to_keep` is the call's argument."""

    # the tensors that weights() gives stay as they are: what is made of one for a layer counts for others
    shares_weights = True

    def __init__(self, router: Xlora, scores_BTGE: Tensor, w_BTGE: Tensor, logits_to_keep: Any) -> None:
        self._router = router
        self._scores_BTGE = scores_BTGE
        self._w_BTGE = w_BTGE
        # {group: (weights, weights times the global scaling)}
        self._of_group: dict[int, tuple[Tensor, Tensor]] = {}
        self._logits_to_keep = logits_to_keep

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        group, scaling = self._router._group_of[layer], self._router.global_scaling
        if group not in self._of_group:
            w_BTE = self._w_BTGE[:, :, group]
            self._of_group[group] = w_BTE, w_BTE if scaling == 1 else w_BTE * scaling
        noted_BTE, w_BTE = self._of_group[group]
        self._router.note(layer, self._scores_BTGE[:, :, group], noted_BTE)
        return asked_of_head(w_BTE, x_BTI.shape[1], self._logits_to_keep)
