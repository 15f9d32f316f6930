"""Activated LoRA (Greenewald et al. 2025, arXiv 2504.12397): experts that act only from their invocation tokens on.

Such an expert has the mixture's weight from the last position in a row's prompt at which its invocation tokens begin, and 0
before, so that keys and values of the earlier tokens are the base's. In a row without these tokens its weight is 0, as in
PEFT. In a call whose prompt is unknown, the row's text so far is searched instead.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraweave.errors import ScopeError
from loraweave.routers.combined import begin, parts_of
from loraweave.routers.tokens._caches import BesideCache
from loraweave.routers.tokens._call import (
    CachedIds,
    Prompts,
    asked_of_head,
    cache_of,
    count_copies,
    current_prompts,
    has_two_sequences,
    real_tokens,
)
from loraweave.routers.weights import MixtureWeights, Router

NAME = "of invocation tokens"
# first positions of an expert whose invocation tokens are absent (never on), and of one that has none (always on)
NEVER, ALWAYS = torch.iinfo(torch.long).max, torch.iinfo(torch.long).min
# the id noted for a token in a cache that no call has shown
UNSEEN = -1

# the ids of a cache's tokens, as far as calls under any mixture have shown them
_BESIDE: BesideCache[CachedIds] = BesideCache(NAME)


def last_place(row: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Return the index in `row` at which the sequence `tokens` begins for the last time, or None."""
    wanted, first = list(tokens), tokens[0]
    for place in range(len(row) - len(wanted), -1, -1):
        # a slice for each place takes ten times as long
        if row[place] == first and list(row[place : place + len(wanted)]) == wanted:
            return place
    return None


class Invoked:
    """A router or MixtureWeights over `experts`, with weight 0 before an expert's `invocations`, {name: token ids}."""

    needs_call = True
    reads_prompts = True

    def __init__(self, router: Router, experts: tuple[str, ...], invocations: Mapping[str, tuple[int, ...]]) -> None:
        self._router = router
        self._invocations = [invocations.get(name, ()) for name in experts]
        self.experts = experts
        self.parts = parts_of(router)
        # by row of the mixture, whether each expert may be used; a router, and weights that learn, may use all
        self._used_BE = [[True] * len(experts)]
        if isinstance(router, MixtureWeights) and not router.values_BTLE.requires_grad:
            self._used_BE = (router.values_BTLE != 0).flatten(1, 2).any(dim=1).tolist()

    def begin(self, model: Any, arguments: Mapping[str, Any]) -> Router:
        """Return one call's router. Raises ScopeError without ids, for an encoder-decoder, or a row of unknown tokens."""
        if has_two_sequences(model):
            raise ScopeError(
                f"expert {self._some!r} acts only from its invocation tokens on, and {type(model).__name__} has an encoder "
                "and a decoder, whose tokens differ: take dataclasses.replace(adapter, invocation=())"
            )
        ids_BT = arguments.get("input_ids")
        if not isinstance(ids_BT, Tensor):
            raise ScopeError(
                f"expert {self._some!r} acts only from its invocation tokens on, and this call of the model has no "
                "input_ids: call it with token ids, or generate() from them"
            )
        cache = cache_of(arguments)
        num_before = 0 if cache is None else int(cache.get_seq_length())
        prompts, mask = current_prompts(), arguments.get("attention_mask")
        if prompts is None:
            seen = self._see(ids_BT, cache, num_before)
            mask_BW = _mask_of(mask, seen.shape) if mask is not None else torch.ones_like(seen)
            start_BE = self._starts(real_tokens(seen, mask_BW), seen.device, whole=not bool((seen == UNSEEN).any()))
        else:
            shape = len(ids_BT), num_before + ids_BT.shape[1]
            copies = count_copies(NAME, prompts, len(ids_BT))
            if self not in prompts.weights:
                prompts.weights[self] = self._starts(prompts.rows, ids_BT.device, whole=True)
            start_BE = prompts.weights[self].repeat_interleave(copies, dim=0)
            mask_BW = _mask_of(mask, shape, _columns(prompts, copies, shape[1]))
        place_BT = (mask_BW.long().cumsum(dim=1) - 1)[:, num_before:]
        on_BTE = (place_BT[:, :, None] >= start_BE.to(place_BT.device)[:, None]).float()
        return _OfCall(begin(self._router, model, arguments), on_BTE, arguments.get("logits_to_keep"))

    @property
    def _some(self) -> str:
        return next(name for name, tokens in zip(self.experts, self._invocations, strict=True) if tokens)

    def _see(self, ids_BT: Tensor, cache: Any, num_before: int) -> Tensor:
        """Return ids_BT of each row from the cache's first token on, and keep them beside the cache; -1 if unknown."""
        state = None if cache is None else _BESIDE.known(cache)
        if state is None:
            state = CachedIds(ids_BT.new_zeros(len(ids_BT), 0))
        state.append(ids_BT.new_full((len(ids_BT), num_before - state.get_seq_length()), UNSEEN))
        state.append(ids_BT)
        _BESIDE.keep(cache, state)
        return state.ids_BT

    def _starts(self, rows: Sequence[Sequence[int]], device: torch.device, *, whole: bool) -> Tensor:
        """Return start_BE: the index among a row's real tokens at which an expert's weight begins; NEVER or ALWAYS.

        `rows` are the real tokens. Unless they are `whole`, a row without an expert's tokens raises ScopeError.
        """
        start_BE = torch.full((len(rows), len(self.experts)), ALWAYS, device=device)
        # a prompt may be that of several rows of the mixture
        used_BE = [[True] * len(self.experts)] if len(rows) % len(self._used_BE) else self._used_BE
        for number, row in enumerate(rows):
            used_E = used_BE[number * len(used_BE) // len(rows)]
            for place, (name, tokens) in enumerate(zip(self.experts, self._invocations, strict=True)):
                if not tokens or not used_E[place]:
                    continue
                start = last_place(row, tokens)
                if start is None and not whole:
                    raise ScopeError(
                        f"expert {name!r} acts only from its invocation tokens {list(tokens)} on. Row {number} has none "
                        "among the tokens that were seen, but its cache has others: call the model with the invocation, or "
                        "generate() from all token ids of the row beside its cache"
                    )
                start_BE[number, place] = NEVER if start is None else start
        return start_BE


class _OfCall:
    """The router's weights in one call times on_BTE, which is 0 before an expert's invocation and 1 from it on."""

    def __init__(self, router: Router, on_BTE: Tensor, logits_to_keep: Any) -> None:
        self._router = router
        self._on_BTE = on_BTE
        self._logits_to_keep = logits_to_keep
        # layers that have the same weights share one tensor
        self.shares_weights = isinstance(router, MixtureWeights) and not router.layers
        self._made: dict[int, Tensor] = {}

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        num_tokens = x_BTI.shape[1]
        if num_tokens in self._made:
            return self._made[num_tokens]
        w_BTE = self._router.weights(x_BTI, layer)
        on_BTE = asked_of_head(self._on_BTE, num_tokens, self._logits_to_keep).to(w_BTE.device)
        if len(w_BTE) not in (1, len(on_BTE)):
            w_BTE = w_BTE.repeat_interleave(len(on_BTE) // len(w_BTE), dim=0)
        w_BTE = w_BTE * on_BTE
        if self.shares_weights:
            self._made[num_tokens] = w_BTE
        return w_BTE


def _mask_of(mask: Any, shape: Sequence[int], known_BW: Tensor | None = None) -> Tensor:
    """Return the first of `mask` and `known_BW` that fits `shape`, (B, W). Raises ScopeError if neither does."""
    if isinstance(mask, Tensor) and tuple(mask.shape) == tuple(shape):
        return mask
    if known_BW is not None and known_BW.shape[1] == shape[1]:
        return known_BW
    shown = tuple(getattr(mask, "shape", ())) or type(mask).__name__
    raise ScopeError(
        f"experts with invocation tokens act from a position in a row's text on, but the attention mask {shown} does not "
        f"tell which of its tokens {tuple(shape)} are real: give a mask of that shape, or none"
    )


def _columns(prompts: Prompts, copies: int, width: int) -> Tensor:
    """Return the prompts' attention mask_BW, each row `copies` times, cut or extended by ones to `width` tokens."""
    mask_BW = prompts.mask_BT.repeat_interleave(copies, dim=0)
    more = max(0, width - mask_BW.shape[1])
    return torch.cat([mask_BW, mask_BW.new_ones(len(mask_BW), more)], dim=1)[:, :width]
