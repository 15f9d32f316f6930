"""Prefixes of prompts that were read and need not be read again under the same weights.

A chat's next turn, and further answers to a prompt, begin with tokens that the model has read. What it made of them depends
on these tokens and on the weights: {content hash: weight}, or the router. Under any other weights nothing is taken. An
adapter that acts from its invocation tokens on has no weight before them, so the part before is shared with rows without it.
"""

import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache

from loraweave.extend.routing import last_place
from loraweave.extend.scoring import following, pad_rows, with_positions
from loraweave.extend.serving import Prefixes

# the least number of tokens: shorter prefixes save less than they cost
MIN_TOKENS = 16
# the most kept prefixes: all are compared with every new row
MAX_KEPT = 1024

# of each layer, keys_HTD and values_HTD of one row
KeysAndValues = Sequence[tuple[Tensor, Tensor]]
# pairs (weights, count): a row's first `count` tokens depend on these weights alone; None is all its tokens
States = list[tuple[Hashable | None, int | None]]


@dataclass(eq=False)
class Kept:
    """A kept prefix: its tokens, their keys and values in each layer, and its last use, by `time.monotonic`."""

    ids: tuple[int, ...]
    states: KeysAndValues
    last_use: float

    @cached_property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.states for tensor in pair)


class KeptPrefixes(Prefixes):
    """The most recently used prefixes, up to `max_bytes` in all, on the model's device."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[Hashable, tuple[int, ...]], Kept] = OrderedDict()

    @property
    def num_kept(self) -> int:
        """The number of kept prefixes."""
        return len(self._kept)

    @property
    def oldest(self) -> float:
        return next((kept.last_use for kept in self._kept.values()), super().oldest)

    def drop_oldest(self) -> None:
        self._drop(next(iter(self._kept)))

    def begin(self, model: Any, tokenizer: Any, rows: Sequence[Any]) -> tuple[dict[str, Tensor], Any, Tensor]:
        for row in rows:
            row.num_kept = 0
        if not self._kept:
            return super().begin(model, tokenizer, rows)
        ids = [line_ids for row in rows for line_ids in row.ids]
        lines = [(row, states) for row in rows for states in states_of(row)]
        known = [self._longest(states, line_ids) for (_, states), line_ids in zip(lines, ids, strict=True)]
        for (row, _), (length, _) in zip(lines, known, strict=True):
            row.num_kept += length
        width = max(length for length, _ in known)
        rest_BT, mask_BT = pad_rows(tokenizer, [line_ids[length:] for line_ids, (length, _) in zip(ids, known, strict=True)])
        before_BP = torch.zeros(len(ids), width, dtype=torch.long)
        for line, (length, _) in enumerate(known):
            before_BP[line, width - length :] = 1
        mask_BT = torch.cat([before_BP, mask_BT], dim=1)
        inputs = with_positions(model, torch.cat([before_BP, rest_BT], dim=1), mask_BT)
        return following(inputs, width), _cache_of(known, width), mask_BT

    def compact(self, cache: Any, mask_BW: Tensor) -> Tensor:
        # every line's columns move to the right, in their order, and those that no line fills are cut off
        width = int(mask_BW.sum(dim=1).max())
        order_BW = mask_BW.argsort(dim=1, stable=True)[:, -width:]
        for layer in cache.layers:
            for name in ("keys", "values"):
                states_BHWD = getattr(layer, name)
                index_BHWD = order_BW[:, None, :, None].expand(-1, states_BHWD.shape[1], -1, states_BHWD.shape[3])
                setattr(layer, name, states_BHWD.gather(2, index_BHWD))
        return mask_BW.gather(1, order_BW)

    def remember(self, rows: Sequence[Any], ended: Sequence[Any], cache: Any) -> None:
        first = 0
        for row in rows:
            states_M = states_of(row) if row in ended and not row.failed else ()
            for line, (ids, states) in enumerate(zip(row.ids, states_M, strict=False), first):
                # the last token was chosen, but the model has not read it
                num_read = len(ids) - 1
                for weights, most in states:
                    length = num_read if most is None else min(most, num_read)
                    if weights is None or length < MIN_TOKENS or not self._max_bytes:
                        continue
                    width = cache.layers[0].keys.shape[-2]
                    span = slice(width - num_read, width - num_read + length)
                    kept = [(layer.keys[line, :, span], layer.values[line, :, span]) for layer in cache.layers]
                    self._keep(weights, ids[:length], kept)
            first += len(row.prompts)

    def _longest(self, states: States, ids: tuple[int, ...]) -> tuple[int, Kept | None]:
        """Return (number of shared tokens, kept prefix) for the prefix that shares most tokens with `ids`, or (0, None).

        Only prefixes under weights in `states` count. The last of `ids` is never taken: the model has to read it.
        """
        most = {weights: len(ids) if count is None else count for weights, count in states if weights is not None}
        best, best_key = MIN_TOKENS - 1, None
        for key, kept in self._kept.items() if most else ():
            if key[0] in most and (common := min(_common(kept.ids, ids), most[key[0]])) > best:
                best, best_key = common, key
        if best_key is None:
            return 0, None
        self._kept.move_to_end(best_key)
        self._kept[best_key].last_use = time.monotonic()
        return best, self._kept[best_key]

    def _keep(self, weights: Hashable, ids: tuple[int, ...], states: KeysAndValues) -> None:
        """Keep copies of these tokens' keys and values, and drop kept prefixes of the same weights that begin them."""
        if any(kept_weights == weights and kept[: len(ids)] == ids for kept_weights, kept in self._kept):
            return
        for key in [key for key in self._kept if key[0] == weights and ids[: len(key[1])] == key[1]]:
            self._drop(key)
        new = Kept(ids, [(keys_HTD.clone(), values_HTD.clone()) for keys_HTD, values_HTD in states], time.monotonic())
        self._kept[weights, ids] = new
        self.kept_bytes += new.num_bytes
        while self.kept_bytes > self._max_bytes or len(self._kept) > MAX_KEPT:
            self.drop_oldest()

    def _drop(self, key: tuple[Hashable, tuple[int, ...]]) -> None:
        self.kept_bytes -= self._kept.pop(key).num_bytes


def states_of(row: Any) -> list[States]:
    """Return each prompt's pairs (weights, count), as from `_states`; weights are None if keys depend on more than weights.

    A router is identified by its formula, not as an object, which would live as long as its keys and values.
    """
    served = row.served
    if served.router is not None:
        return [[(None if served.is_alone or served.is_activated else served.identity, None)]]
    return [_states(member, prompt) for member, prompt in zip(served.members, row.prompts, strict=True)]


def _states(member: Any, prompt: Sequence[int]) -> States:
    """Return pairs (weights, count): keys and values of the first `count` tokens (None: all) depend on these weights alone.

    An adapter with invocation tokens is among the weights from these tokens on; before them it has no part.
    """
    if not member.is_activated:
        return [(frozenset(member.weights.items()), None)]
    invoked = {content: adapter.invocation for content, adapter in member.adapters.items() if adapter.invocation}
    starts = {content: last_place(prompt, tokens) for content, tokens in invoked.items()}
    counting: set[tuple[Hashable, ...]] = {item for item in member.weights.items() if item[0] not in starts}
    states: States = []
    for start in sorted({start for start in starts.values() if start is not None}):
        states.append((frozenset(counting), start))
        counting |= {(content, member.weights[content], start) for content, place in starts.items() if place == start}
    return [*states, (frozenset(counting), None)]


def _cache_of(known: Sequence[tuple[int, Kept | None]], width: int) -> DynamicCache | None:
    """Make a cache of `width` tokens from each prompt's (length, kept prefix), left-padded; None if no prompt has one."""
    like = next((kept for _, kept in known if kept is not None), None)
    if like is None:
        return None
    cache = DynamicCache()
    for number, (keys_HTD, values_HTD) in enumerate(like.states):
        states_BHWD = [
            torch.stack(
                [
                    like_HTD.new_zeros(like_HTD.shape[0], width, like_HTD.shape[2])
                    if kept is None
                    else pad(kept.states[number][part][:, :length], (0, 0, width - length, 0))
                    for length, kept in known
                ]
            )
            for part, like_HTD in enumerate((keys_HTD, values_HTD))
        ]
        cache.update(*states_BHWD, number)
    return cache


def _common(kept: Sequence[int], ids: Sequence[int]) -> int:
    """Return how many leading tokens both sequences share, leaving out the last of `ids`."""
    pairs = zip(kept, ids[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
