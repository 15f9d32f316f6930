"""What a server keeps between requests: keys and values of beginnings that were read; and the budget of all its memory.

A chat's next turn, and further answers to a prompt, begin with tokens that the model has read. What it made of them depends
on these tokens and on the weights: {content hash: weight}, or the router. Under any other weights nothing is taken. An
adapter that counts from its invocation tokens on has no weight before them, where what is kept is shared with rows without.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from loraweave.errors import CompositionError
from loraweave.hub.formats._base_layer import head_size
from loraweave.serving.experts import Experts
from loraweave.serving.row import Row

# shorter ones save less than they cost
MIN_TOKENS = 16
# each is looked at for every row that begins
MAX_KEPT = 1024

# of each layer, keys_HTD and values_HTD of one row
States = Sequence[tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Kept:
    """A kept prefix: its tokens, their keys and values in each layer, and its last use, by `time.monotonic`."""

    ids: tuple[int, ...]
    states: States
    last_use: float

    @cached_property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.states for tensor in pair)


class KeptPrefixes:
    """The prefixes used last, of at most `max_bytes` together, on the model's device. One thread uses it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[Hashable, tuple[int, ...]], Kept] = OrderedDict()
        self.kept_bytes = 0

    @property
    def oldest(self) -> float:
        """The time of the last use of the least recently used prefix; infinity where there is none."""
        return next((kept.last_use for kept in self._kept.values()), math.inf)

    def drop_oldest(self) -> None:
        """Drop the prefix that was used longest ago."""
        self._drop(next(iter(self._kept)))

    def longest(self, states: Sequence[tuple[Hashable | None, int | None]], ids: tuple[int, ...]) -> tuple[int, Kept | None]:
        """Return (number of tokens, prefix) of the longest common beginning, without the last of `ids`; (0, None) for none.

        `states` are those of a Member: weights, and up to how many tokens they are the row's.
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

    def keep(self, weights: Hashable | None, ids: tuple[int, ...], states: States) -> None:
        """Keep copies of what the model made of these tokens, in place of shorter beginnings of them."""
        if weights is None or len(ids) < MIN_TOKENS or not self._max_bytes:
            return
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


def _common(kept: Sequence[int], ids: Sequence[int]) -> int:
    """Count the tokens that both begin with, the last of `ids` excepted."""
    count = 0
    for one, other in zip(kept, ids[:-1], strict=False):
        if one != other:
            break
        count += 1
    return count


class Memory:
    """A budget of `max_bytes` for rows of a model, kept beginnings, and adapters. One thread uses it.

    What running rows need, their adapters included, comes first. What no row uses, of beginnings and of adapters, makes
    room, those first that were used longest ago.

    A row counts at its longest, prompt and answer, and so do the rows beside it, whose lines are filled up. This adds up
    bytes and places nothing: the one budget is S-LoRA's (Sheng et al. 2024, arXiv 2311.03285), its pages are not here.
    """

    def __init__(self, model: Any, max_bytes: float, prefixes: KeptPrefixes, experts: Experts) -> None:
        self._max_bytes = max_bytes
        self._token_bytes = 0 if max_bytes == math.inf else _token_bytes(model)
        self._prefixes, self._experts = prefixes, experts

    def needed(self, rows: Sequence[Row]) -> int:
        """Return the bytes that these rows need together."""
        if not rows:
            return 0
        lines = sum(len(row.prompts) for row in rows)
        adapters = {key: size for row in rows for key, size in self._experts.sizes(row.served).items()}
        return lines * max(row.longest for row in rows) * self._token_bytes + sum(adapters.values())

    def has_room(self, rows: Sequence[Row]) -> bool:
        """Return whether the rows fit once nothing is kept beside them."""
        return self._max_bytes == math.inf or self.needed(rows) <= self._max_bytes

    def make_room(self, rows: Sequence[Row]) -> None:
        """Drop kept prefixes and unused adapters until the rest fits beside these rows."""
        if self._max_bytes == math.inf:
            # nothing is added up at each step of a server without a limit
            return
        spare = self._max_bytes - self.needed(rows)
        kept: tuple[KeptPrefixes | Experts, ...] = (self._prefixes, self._experts)
        while sum(holder.kept_bytes for holder in kept) > spare:
            oldest = min(kept, key=lambda each: each.oldest)
            if oldest.oldest == math.inf:
                break
            oldest.drop_oldest()


def _token_bytes(model: Any) -> int:
    """Return the bytes of one token's keys and values in all layers. Raises CompositionError for an unknown config."""
    config = model.config.get_text_config()
    size = head_size(config)
    if size is None:
        raise CompositionError("memory_bytes needs a model whose config has the number and the size of its attention heads")
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * kv_heads * size * model.dtype.itemsize)
