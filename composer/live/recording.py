"""Notes that layers take while they run, from which the last forward's weights or a recording's are read.

A note is one entry in a dictionary and keeps references only. The last forward and the open recordings are context
variables, so that threads and asyncio tasks are apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from loraweave.composer.live.fitting import Fitting
from loraweave.composer.live.token_weights import MadeWeights
from loraweave.composer.model.layers import TargetLayer
from loraweave.errors import CompositionError, ScopeError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights

# the bytes of one forward's weights by token that are kept, in case somebody asks afterwards
KEPT_BYTES = 64 * 2**20


class Setting:
    """The context needed to read notes: the engine's experts, bound to the model, and the fitting that knows its layers."""

    def __init__(self, pool: ExpertPool, fitting: Fitting) -> None:
        self._pool = pool
        self.fitting = fitting
        self._layers_of: dict[str, frozenset[str]] = {}

    def updates(self, expert: str, layer: str) -> bool:
        """Return True if the expert has factors in the layer. An expert of a lazy pool is opened once for all layers."""
        if expert not in self._layers_of:
            self._layers_of[expert] = frozenset(self._pool.adapters[expert].layers)
        return layer in self._layers_of[expert]


class Note(NamedTuple):
    """A note of one call of one layer: its output's shape, its kernel's class, and weights made in the call.

    `kept` is False if the weights were dropped because they were too large.
    """

    shape: torch.Size
    kernel: type | None = None
    w_BTE: Tensor | None = None
    kept: bool = True


class Usage:
    """The last call of every layer under one activation of `owner`.

    `experts` are active, with the weights of `mixture`; None if each call computes them, by a router or from parameters.
    """

    def __init__(self, owner: object, experts: tuple[str, ...], mixture: MixtureWeights | None) -> None:
        self.owner = ref(owner)
        self.experts = experts
        self.mixture = mixture
        # the weights that calls make, checked when they are made
        self.made = MadeWeights(experts) if mixture is None else None
        self.notes: dict[str, Note] = {}
        # the context's state while this usage is the last one and nobody records
        self.quiet: _State | None = None
        self._counted: set[str] = set()
        self._num_bytes = 0

    def saw(self, layer: str, note: Note, w_BTE: Tensor | None = None, *, again: bool = False) -> None:
        """Note a layer's call and the weights that it made, if any; with `again` they were checked at an earlier layer.

        Raises WeightingError for weights on a CPU that are not finite.
        """
        kept = note
        if w_BTE is not None and self.made is not None:
            if not again:
                self.made.require_finite(layer, w_BTE)
            # weights that learn may be changed in place by the next step
            note = note._replace(w_BTE=w_BTE.detach().clone() if w_BTE.requires_grad else w_BTE)
            if layer in self._counted:
                # the next forward has begun
                self._counted.clear()
                self._num_bytes = 0
            self._counted.add(layer)
            self._num_bytes += w_BTE.nbytes
            kept = note if self._num_bytes <= KEPT_BYTES else note._replace(w_BTE=None, kept=False)
        self.notes[layer] = kept
        if STATE.get() is not self.quiet:
            self.tell(layer, note)

    def require_all(self) -> None:
        """Raise WeightingError if weights that calls made on a GPU were not finite."""
        if self.made is not None:
            self.made.require_all()

    def tell(self, layer: str, note: Note) -> None:
        """Make this usage the last one of its context, and give the note to every open trace."""
        state, owner = STATE.get(), self.owner()
        if owner is not None and state.by_owner.get(owner) is not self:
            # a new dictionary: contexts that were copied from this one have the old one
            by_owner = WeakKeyDictionary(state.by_owner)
            by_owner[owner] = self
            state = _State(by_owner, state.traces)
            STATE.set(state)
        for trace in state.traces:
            trace.add(self, layer, note)
        self.quiet = None if state.traces else state

    def weights(self, setting: Setting) -> UsedWeights:
        """Return the weights of every layer's last call. Raises CompositionError if they were too large to keep."""
        notes, experts = dict(self.notes), self.experts
        if not all(note.kept for note in notes.values()):
            raise CompositionError(
                f"the weights of the last forward are more than the {KEPT_BYTES // 2**20} MiB that are kept unasked: run it "
                "inside `with engine.record() as trace:`, and read trace.weights"
            )
        layers = setting.fitting.layers
        return UsedWeights(
            experts, {name: _weights_of(self, note, layers[name], experts, setting) for name, note in notes.items()}
        )


class Trace:
    """The weights that an engine's layers used while this was open, call after call; keeps all their tensors alive."""

    def __init__(self, owner: object, setting: Setting) -> None:
        self._owner = ref(owner)
        self._setting = setting
        self._usages: dict[int, Usage] = {}
        self._calls: dict[str, list[tuple[Usage, Note]]] = {}

    def add(self, usage: Usage, layer: str, note: Note) -> None:
        """Take a note if it belongs to the recorded engine and its layer is not run again by a backward pass."""
        if usage.owner() is self._owner() and torch._C._current_graph_task_id() == -1:
            self._usages[id(usage)] = usage
            self._calls.setdefault(layer, []).append((usage, note))

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts that took part in some call."""
        return tuple(dict.fromkeys(expert for usage in self._usages.values() for expert in usage.experts))

    def calls(self, layer: str) -> list[UsedLayer]:
        """Return a layer's weights in each call, over `experts`; consecutive calls of equal weights and rows are one."""
        experts, target = self.experts, self._setting.fitting.layers[layer]
        calls = []
        for (_, by_input, _), group in groupby(self._calls.get(layer, []), key=_kind_of_call):
            same = list(group)
            first = _weights_of(*same[0], target, experts, self._setting)
            if by_input or first.w_BTE.shape[1] > 1:
                rest = [_weights_of(usage, note, target, experts, self._setting) for usage, note in same[1:]]
                calls += [first, *rest]
            else:
                counts = Counter(note.shape for _, note in same)
                tokens = {shape: _rows_and_tokens(target, shape, first.w_BTE.shape[1])[1] for shape in counts}
                calls.append(replace(first, num_tokens=sum(tokens[shape] * count for shape, count in counts.items())))
        return calls

    @property
    def weights(self) -> UsedWeights:
        """The calls of each layer one after the other on the token axis: a prompt, then the tokens that were generated.

        Raises ScopeError where calls had different numbers of rows.
        """
        return UsedWeights(self.experts, {layer: _join(layer, self.calls(layer)) for layer in self._calls})


def last_weights(owner: object, setting: Setting) -> UsedWeights:
    """Return the weights of `owner`'s last forward in this context, if any. Raises CompositionError if too large."""
    usage = STATE.get().by_owner.get(owner)
    return UsedWeights((), {}) if usage is None else usage.weights(setting)


@contextmanager
def recording(owner: object, setting: Setting) -> Iterator[Trace]:
    """Open a trace of `owner` that takes the notes of this context until the block is left."""
    trace = Trace(owner, setting)
    STATE.set(_State(STATE.get().by_owner, (*STATE.get().traces, trace)))
    try:
        yield trace
    finally:
        # not by a token: a generator that was dropped ends in another context
        STATE.set(_State(STATE.get().by_owner, tuple(other for other in STATE.get().traces if other is not trace)))


@dataclass(frozen=True, eq=False)
class _State:
    """The state of a context: the last usage of each engine, and the open traces."""

    by_owner: WeakKeyDictionary[object, Usage]
    traces: tuple[Trace, ...]


_NOTHING = _State(WeakKeyDictionary(), ())
STATE: ContextVar[_State] = ContextVar("loraweave_usages", default=_NOTHING)


def _kind_of_call(call: tuple[Usage, Note]) -> tuple[object, bool, int]:
    usage, note = call
    return id(usage), note.w_BTE is not None, note.shape[0] if note.shape else 1


def _weights_of(usage: Usage, note: Note, target: TargetLayer, experts: tuple[str, ...], setting: Setting) -> UsedLayer:
    """Return the note's weights over `experts`, with 0 for those that do not update the layer or were not active."""
    active = usage.experts
    w_BTE = note.w_BTE
    if w_BTE is None:
        w_BTE = torch.zeros(1, 1, len(active)) if usage.mixture is None else usage.mixture.for_layer(target.name)
    place = {name: at for at, name in enumerate(experts)}
    taking_part = [at for at, name in enumerate(active) if setting.updates(name, target.name)]
    found_BTE = w_BTE.new_zeros(*w_BTE.shape[:2], len(experts))
    found_BTE[..., [place[active[at]] for at in taking_part]] = w_BTE[..., taking_part]
    kernel = "" if note.kernel is None else note.kernel.__module__.rpartition(".")[2]
    return UsedLayer(found_BTE, *_rows_and_tokens(target, note.shape, w_BTE.shape[1]), kernel)


def _rows_and_tokens(layer: TargetLayer, shape: torch.Size, num_tokens: int) -> tuple[int, int]:
    """Return the numbers of rows and tokens in a layer's output of this shape.

    An output of two axes is split into rows of `num_tokens`, if that is above 1.
    """
    rows, tokens = layer.kind.rows(layer.module, torch.empty(shape, device="meta")).shape[:2]
    if len(shape) == 2 and num_tokens > 1 and rows % num_tokens == 0:
        return rows // num_tokens, num_tokens
    return rows, tokens


def _join(layer: str, parts: list[UsedLayer]) -> UsedLayer:
    if len(parts) == 1:
        return parts[0]
    rows = list(dict.fromkeys(part.num_rows for part in parts))
    if len(rows) > 1:
        raise ScopeError(
            f"the recorded calls of layer {layer!r} had {', '.join(map(str, rows))} rows, which are not one batch: record "
            "them one by one"
        )
    # a mixture's own weights stay where they were made, a router's are where the layer is
    device = parts[0].w_BTE.device
    w_BTE = torch.cat([spread(part.w_BTE.to(device), part.num_rows, part.num_tokens) for part in parts], dim=1)
    return UsedLayer(w_BTE, parts[0].num_rows, w_BTE.shape[1])


@dataclass(frozen=True, eq=False)
class UsedLayer:
    """The w_BTE of one layer, where B or T of size 1 is shared by the `num_rows` rows and `num_tokens` tokens of its input.

    `kernel` is the file of `composer/live/kernels/` that mixed it; empty where nothing was added or the layer is not linear.
    """

    w_BTE: Tensor
    num_rows: int
    num_tokens: int
    kernel: str = ""

    @property
    def spread_BTE(self) -> Tensor:
        """The weights with a value for every row and token."""
        return spread(self.w_BTE, self.num_rows, self.num_tokens)


@dataclass(frozen=True, eq=False)
class UsedWeights(Mapping[str, Tensor]):
    """The mapping {layer: w_BTE} of the layers that ran, in that order; the last axis is `experts`, those that took part.

    An expert that leaves a layer alone has weight 0 there. `layers` also has the rows and tokens that shared axes stand for.
    """

    experts: tuple[str, ...]
    layers: Mapping[str, UsedLayer]

    def __getitem__(self, layer: str) -> Tensor:
        return self.layers[layer].w_BTE

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def spread(w_BTE: Tensor, num_rows: int, num_tokens: int) -> Tensor:
    """Return the weights expanded to (`num_rows`, `num_tokens`, E); each of B rows serves num_rows / B consecutive rows.

    Raises ScopeError if rows or tokens are not such multiples.
    """
    rows, tokens, _ = w_BTE.shape
    if tokens not in (1, num_tokens) or num_rows % rows != 0:
        raise ScopeError(
            f"weights of {rows} rows and {tokens} tokens do not fit a batch or mask of {num_rows} rows and {num_tokens} "
            "tokens; give the mask of the call that used them"
        )
    if rows not in (1, num_rows):
        w_BTE = w_BTE.repeat_interleave(num_rows // rows, dim=0)
    return w_BTE.expand(num_rows, num_tokens, -1)
