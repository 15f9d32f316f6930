"""Routers that decide for a sequence: by the mean over a row's tokens so far, which a cache carries on as running sums."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loraweave import Router, ScopeError
from loraweave.extend.routing import BesideCache, RowsAndTokens, TokenRouter, block_of, cache_of, has_two_sequences

Decision = Literal["sequence", "token"]


class BySequence(TokenRouter):
    """A router that, with `decision` "sequence", weighs token t by the mean of `summed` over its row's real tokens 1..t.

    At the last token that is one decision for the sequence and layer; the running mean is its causal form, which depends on
    no later token, so that generation is the same with and without a cache. A layer outside the blocks (lm_head), which may
    see only the last tokens, decides for each token. With "token" all layers do.

    For models of one sequence of tokens, called with an attention mask (rows, tokens) or none; ScopeError for others.
    """

    decision: Decision

    def follow(self, decision: Decision) -> None:
        """Set `decision` and make the store of running sums, one for each cache; a subclass calls this in __init__."""
        self.decision = decision
        self._beside: BesideCache[RunningSums] = BesideCache(self.name)

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return scores_BTE of the layer's input in fp32 or better, -inf for experts that do not update the layer."""
        raise NotImplementedError

    def summed(self, scores_BTE: Tensor) -> Tensor:
        """Return finite values (B, T, E) of the tokens' scores, over which the running means are taken."""
        raise NotImplementedError

    def decided(self, mean_BTE: Tensor, scores_BTE: Tensor, layer: str) -> Tensor:
        """Return w_BTE from the running means and the tokens' own scores."""
        raise NotImplementedError

    def of_tokens(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE with each token decided separately."""
        scores_BTE = self.scores(x_BTI, layer)
        return self.decided(self.summed(scores_BTE), scores_BTE, layer)

    @property
    def needs_call(self) -> bool:
        """True if the router needs `begin` before each call of the model: unless it decides for each token."""
        return self.decision == "sequence"

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE. Raises ScopeError for a decision by sequence."""
        if self.decision == "sequence":
            raise ScopeError(
                f"router {self.name!r} decides by the tokens so far, and one input of layer {layer!r} does not say which "
                "are real: activate() it in a Composer, whose calls begin with it, or make it with decision='token'"
            )
        return self.of_tokens(x_BTI, layer)

    def begin(self, model: nn.Module, arguments: Mapping[str, Any]) -> Router:
        """Return the router for one call of the model; `arguments` are the call's, by name.

        Raises ScopeError if they do not say which tokens are real, and what `BesideCache.of` raises.
        """
        if not self.needs_call:
            return self
        if has_two_sequences(model):
            raise ScopeError(
                f"router {self.name!r} decides for one sequence, and {type(model).__name__} has an encoder and a decoder, "
                "whose tokens differ: make it with decision='token'"
            )
        cache = cache_of(arguments)
        state = None if cache is None else self._beside.of(cache)
        new_BT = _real_tokens(self.name, arguments)
        if state is None:
            state = RunningSums(new_BT[:, :0])
        call = _OfCall(self, state, new_BT)
        self._beside.keep(cache, state)
        return call


class RunningSums(RowsAndTokens):
    """The mask real_BT of a cache's tokens, and for each layer sums_BTE of what `summed` returns.

    Token t's sum is over the real tokens up to t, so that a cache can be cut. A layer that a call did not reach has
    fewer tokens than the others.
    """

    def __init__(self, real_BT: Tensor) -> None:
        self.real_BT = real_BT
        self.sums: dict[str, Tensor] = {}

    def last(self) -> dict[str, Tensor]:
        """Return {layer: sum_B1E over all tokens}, for the layers that have seen them all."""
        num_tokens = self.get_seq_length()
        return {layer: s_BTE[:, -1:] for layer, s_BTE in self.sums.items() if num_tokens and s_BTE.shape[1] == num_tokens}

    def append(self, real_BT: Tensor) -> None:
        self.real_BT = torch.cat([self.real_BT, real_BT.to(self.real_BT.device)], dim=1)

    def put(self, layer: str, sums_BTE: Tensor) -> None:
        """Store a layer's sums for the T tokens added last."""
        num_before, known_BTE = self.get_seq_length() - sums_BTE.shape[1], self.sums.get(layer)
        new_BTE = sums_BTE.detach()
        self.sums[layer] = new_BTE if known_BTE is None else torch.cat([known_BTE[:, :num_before], new_BTE], dim=1)

    def get_seq_length(self) -> int:
        return self.real_BT.shape[1]

    def change(self, make: Callable[[Tensor], Tensor]) -> None:
        self.real_BT = make(self.real_BT)
        self.sums = {layer: make(s_BTE) for layer, s_BTE in self.sums.items()}


class _OfCall:
    """A router for the tokens of one call of the model, whose running sums continue from those of the call's cache."""

    def __init__(self, router: BySequence, state: RunningSums, real_BT: Tensor) -> None:
        self._router = router
        self._state = state
        self._real_BT = real_BT
        # a backward pass that runs layers again must not see the sums of later calls
        self._before = state.last()
        num_B1 = state.real_BT.sum(dim=1, keepdim=True).to(real_BT.device)
        self._num_BT = (num_B1 + real_BT.cumsum(dim=1)).clamp(min=1)
        self._begins_cache = not state.get_seq_length()
        self._ran: set[str] = set()
        state.append(real_BT)

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE. Raises ScopeError for a layer that sees other tokens than the call's, or missed those before."""
        router = self._router
        tensor = next(itertools.chain(router.parameters(), router.buffers()), None)
        if tensor is not None and tensor.device != x_BTI.device:
            with torch.inference_mode(False):
                router.to(x_BTI.device)
        if block_of(layer) is None:
            return router.of_tokens(x_BTI, layer)
        self._require_tokens(x_BTI, layer)
        scores_BTE = router.scores(x_BTI, layer)
        exact = torch.promote_types(scores_BTE.dtype, torch.float32)
        left_out_BT = ~self._real_BT.to(x_BTI.device)
        sums_BTE = router.summed(scores_BTE.to(exact)).masked_fill(left_out_BT[..., None], 0.0).cumsum(dim=1)
        if layer in self._before:
            sums_BTE = sums_BTE + self._before[layer].to(sums_BTE.device)
        # layers that gradient checkpointing runs again have already added their sums
        if torch._C._current_graph_task_id() == -1:
            self._add(layer, sums_BTE)
        mean_BTE = sums_BTE / self._num_BT.to(x_BTI.device)[..., None]
        return router.decided(mean_BTE, scores_BTE, layer)

    def _add(self, layer: str, sums_BTE: Tensor) -> None:
        if layer in self._ran:
            # it is unknown from which run's sums another call should continue
            self._state.sums.pop(layer, None)
        else:
            self._state.put(layer, sums_BTE)
        self._ran.add(layer)

    def _require_tokens(self, x_BTI: Tensor, layer: str) -> None:
        if x_BTI.shape[:2] != self._real_BT.shape:
            raise ScopeError(
                f"router {self._router.name!r} decides for the {tuple(self._real_BT.shape)} rows and tokens of the call, "
                f"but layer {layer!r} sees {tuple(x_BTI.shape[:2])} others: leave it out of the adapters, or make the "
                "router with decision='token'"
            )
        if layer not in self._before and not self._begins_cache:
            raise ScopeError(
                f"router {self._router.name!r} has to see every token of a cache, but layer {layer!r} did not run once for "
                "each of those in this one, as after a call that was broken off: begin with an empty cache"
            )


def _real_tokens(router: str, arguments: Mapping[str, Any]) -> Tensor:
    """Return real_BT, True for the call's tokens that are not padding.

    Raises ScopeError for a call without tokens or with a mask that is not (rows, tokens).
    """
    inputs = next((arguments[name] for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None), None)
    if inputs is None or inputs.ndim < 2:
        raise ScopeError(
            f"router {router!r} decides by the tokens of a row, and this call of the model has no input_ids or "
            "inputs_embeds: call it with these, or make the router with decision='token'"
        )
    num_rows, num_tokens = inputs.shape[:2]
    mask = arguments.get("attention_mask")
    if mask is None:
        return torch.ones(num_rows, num_tokens, dtype=torch.bool, device=inputs.device)
    shape = tuple(getattr(mask, "shape", ()))
    if len(shape) != 2 or shape[0] != num_rows or shape[1] < num_tokens:
        shown = shape or type(mask).__name__
        raise ScopeError(
            f"router {router!r} cannot tell from the attention mask {shown} which of the {(num_rows, num_tokens)} tokens "
            "are real: give one of rows and tokens, or none, or make the router with decision='token'"
        )
    real_BT: Tensor = mask[:, mask.shape[1] - num_tokens :] != 0
    return real_BT
