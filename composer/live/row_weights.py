"""Weights that are known before the model runs and shared by all tokens of a row; each layer's kernel is made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from weakref import finalize

import torch
from torch import Tensor

from loraweave.common.process import lock_of
from loraweave.composer.live.hook import LiveHook, Prepared
from loraweave.composer.live.kernels._parts import (
    Choice,
    Kernel,
    RowSets,
    SomeRows,
    Workload,
    choose,
    compiled_threads,
    own_precision,
    place_of,
    repeat_rows,
    row_kernels,
    row_sets,
)
from loraweave.composer.live.pages import PlacedFactors
from loraweave.composer.live.residents import Lease
from loraweave.composer.model.layers import TargetLayer
from loraweave.errors import ScopeError
from loraweave.routers.weights import MixtureWeights


@dataclass(frozen=True, eq=False)
class LayerMixture:
    """The parts that a layer adds in one forward pass: a product and an affine part, each None if no expert has one.

    `w_BTE` are the weights if the call makes them, and `again` is True if an earlier layer of the call had the same weights;
    `lasts` is True if the next call may use the same kernel.
    """

    kernel: Kernel | None
    affine: Affine | None
    w_BTE: Tensor | None = None
    lasts: bool = True
    again: bool = False


class RowWeights:
    """Expert weights known before the call, of the active experts only: one set for each of M rows, or for all (M = 1).

    `workspace` lends memory for gathered factors, and `only` names the one kernel that may run, None for any.
    """

    learns = False
    num_tokens = 1
    call_router = None
    watched = ()

    def __init__(
        self, mixture: MixtureWeights, workspace: Workspace, hooks: Sequence[LiveHook] = (), *, only: str | None = None
    ) -> None:
        self._mixture = mixture
        # the name of the only kernel that may run, if any
        self.only = only
        values = mixture.values_BTLE
        own_rows = not mixture.layers and values.dtype is torch.float32 and bool((values != values[:1]).any())
        self._hooks = hooks if own_rows and only is None else ()
        # the hooks that serve the device of the last call
        self._serving: tuple[LiveHook, ...] = ()
        self._prepared: tuple[LiveHook, Prepared] | None = None
        # the open activations, which share what was prepared
        self._open: dict[int, tuple[Lease, Mapping[str, TargetLayer]]] = {}
        self._lock = lock_of(self)
        self._workspace = workspace
        # all are loaded before a model runs
        self._kernels = row_kernels()
        # gathered factors go back with this object, which alone refers to them
        self._borrowed: list[Tensor] = []
        self._return = finalize(self, workspace.give, self._borrowed)
        self._return.atexit = False
        self.num_mixtures = values.shape[0]
        # the layers with a weight other than 0; None for all
        self._used: set[str] | None = None
        if mixture.layers:
            self._used = {layer for index, layer in enumerate(mixture.layers) if bool((values[:, :, index] != 0).any())}
        self._layers: dict[str, _LayerRows] = {}
        # by layer ("" where all share the weights) and the experts' ranks there, 0 for an expert without factors
        self._ranked: dict[tuple[str, tuple[int, ...]], RankedRows] = {}

    @property
    def num_bytes(self) -> int:
        """The bytes that the kernels made so far keep."""
        # over a list, since a forward in another thread may add a layer meanwhile
        made = list(self._layers.values())
        return sum(kernel.num_bytes for rows in made for kernel in list(rows.kernels.values()))

    def escaped(self) -> None:
        """Do not reuse the gathered factors' memory from now on, since a graph of autograd may outlive this object."""
        self._return.detach()

    def skips(self, layer: str) -> bool:
        return not self._mixture.experts if self._used is None else layer not in self._used

    def enter(self, lease: Lease, layers: Mapping[str, TargetLayer]) -> bool:
        """Begin an activation, which ends with its lease; return True if a hook may prepare it, and no other one is open."""
        if not self._hooks:
            return False
        with self._lock:
            self._open[id(lease)] = lease, layers
            lease.at_end = partial(self._leave, id(lease))
            return len(self._open) == 1

    def _leave(self, number: int) -> None:
        with self._lock:
            del self._open[number]
            if not self._open and self._prepared is not None:
                hook, prepared = self._prepared
                hook.release(prepared)
                self._prepared = None

    def find_serving(self, device: torch.device) -> bool:
        """Find the hooks that serve calls with inputs on this device; return True if there are any."""
        self._serving = ()
        for hook in self._hooks:
            if device.type in hook.devices:
                self._serving += (hook,)
        return bool(self._serving)

    def begin_call(self) -> Prepared | None:
        """Begin a call of the model; return the state that a hook has prepared for its layers, or None."""
        if torch._C._are_functorch_transforms_active():
            return None
        with self._lock:
            if self._prepared is None and self._open:
                offers = ((hook, hook.prepare(self._mixture, *next(iter(self._open.values())))) for hook in self._serving)
                self._prepared = next(((hook, prepared) for hook, prepared in offers if prepared is not None), None)
            return None if self._prepared is None else self._prepared[1]

    def mixture(
        self, layer: TargetLayer, x_BTI: Tensor, device: torch.device, dtype: torch.dtype, lease: Lease
    ) -> LayerMixture:
        """Return the parts that a layer adds. Raises ScopeError unless the input's rows are a multiple of the mixture's."""
        num_rows, num_tokens = x_BTI.shape[:2]
        require_multiple(self.num_mixtures, num_rows, f"input of layer {layer.name!r}")
        held = self._prepared
        if held is not None and (by_hook := self._by_hook(held, layer, x_BTI, device, dtype)) is not None:
            return by_hook
        layer_rows = self._layers.get(layer.name)
        with torch.inference_mode(False), torch.no_grad():
            if layer_rows is None or layer_rows.device != device or layer_rows.dtype != dtype:
                layer_rows = self._layers[layer.name] = self._make_rows(layer.name, device, dtype, lease)
            kernel = None
            if layer_rows.ranked.touched:
                kernel = self._kernel(layer_rows, layer, num_rows // self.num_mixtures * num_tokens, lease)
        return LayerMixture(kernel, layer_rows.affine, lasts=self._prepared is None)

    def _by_hook(
        self, held: tuple[LiveHook, Prepared], layer: TargetLayer, x_BTI: Tensor, device: torch.device, dtype: torch.dtype
    ) -> LayerMixture | None:
        """Return the parts that a layer adds by `held`, a hook and its prepared state; None to use the registry's kernels.

        With gradients it returns None, since no graph may outlive the prepared state.
        """
        if (torch.is_grad_enabled() and x_BTI.requires_grad) or torch._C._are_functorch_transforms_active():
            return None
        hook, prepared = held
        if not prepared.reaches(layer.name):
            return LayerMixture(None, None)
        one = x_BTI.shape[0] * x_BTI.shape[1] == self.num_mixtures
        kernel = hook.kernel(prepared, layer, device, dtype, one=one)
        return None if kernel is None else LayerMixture(kernel, None)

    def _make_rows(self, layer: str, device: torch.device, dtype: torch.dtype, lease: Lease) -> _LayerRows:
        placed: list[PlacedFactors | None] = []
        ranks: tuple[int, ...] = ()
        has_affine = False
        for name in self._mixture.experts:
            placed.append(part := lease.part(name, layer, device, dtype))
            ranks += (0 if part is None else part.a_RI.shape[0],)
            has_affine |= part is not None and (part.gain_O is not None or part.bias_O is not None)
        # shared by layers that share the weights and the experts' ranks
        key = layer if self._mixture.layers else "", ranks
        if (ranked := self._ranked.get(key)) is None:
            rows = row_sets(self._mixture.for_layer(layer).detach())
            assert rows is not None
            ranked = self._ranked[key] = RankedRows.of(rows, ranks)
        affine = None
        if has_affine and (table := AffineTable.of(placed)) is not None:
            affine = table.weigh(self._mixture.for_layer(layer).to(device), in_order=self.only is not None)
        return _LayerRows(device, dtype, ranked, affine)

    def _kernel(self, found: _LayerRows, layer: TargetLayer, tokens: int, lease: Lease) -> Kernel:
        """Return the layer's cheapest kernel for `tokens` tokens per row; each of its kernels is made once and kept."""
        choice = Choice(self.only) if self.only else choose(found.workload(layer.num_inputs, layer.num_outputs, tokens))
        dtype = torch.promote_types(found.dtype, torch.float32) if choice.exact else found.dtype
        key = choice.path, dtype
        if key not in found.kernels:
            names = [self._mixture.experts[place] for place in found.ranked.places]
            parts = [lease.part(name, layer.name, found.device, found.dtype) for name in names]
            kernel = self._kernels[choice.path].of(
                [part for part in parts if part is not None],
                found.ranked.rows,
                dtype,
                partial(self._borrow, dtype, found.device),
            )
            found.kernels[key] = found.ranked.among_all(kernel, self.num_mixtures, found.device)
        return found.kernels[key]

    def _borrow(self, dtype: torch.dtype, device: torch.device, num_elements: int) -> Tensor:
        tensor = self._workspace.take(num_elements, dtype, device)
        self._borrowed.append(tensor)
        return tensor


def require_multiple(num_mixtures: int, num_rows: int, what: str) -> None:
    """Raise ScopeError if the number of rows of `what` is not a multiple of the mixture's."""
    if num_rows % num_mixtures if num_mixtures else num_rows:
        raise ScopeError(
            f"the weights have {num_mixtures} rows, but the {what} has {num_rows}, not a multiple; give one mixture for "
            "each row of the batch, or one mapping for all"
        )


@dataclass(frozen=True, eq=False)
class RankedRows:
    """The rows of a mixture for all layers in which the experts have the same ranks.

    `places` are the indices of experts with a rank above 0, `touched` those of the rows that use one of these experts, and
    `rows` these rows' (index in `places`, weight) pairs. `work` has the ranks, without sizes of the layer and its input.
    """

    places: tuple[int, ...]
    touched: tuple[int, ...]
    rows: RowSets
    work: Workload

    @classmethod
    def of(cls, rows: RowSets, ranks: tuple[int, ...]) -> RankedRows:
        """Return `rows` without the experts of rank 0, which have no factors; `ranks` has one rank for each expert."""
        places = tuple(compress(range(len(ranks)), ranks))
        if len(places) < len(ranks):
            number = dict(zip(places, range(len(places)), strict=True))
            rows = tuple([tuple([(number[place], w) for place, w in row if place in number]) for row in rows])
        place_ranks = tuple(filter(None, ranks))
        touched = tuple(compress(range(len(rows)), rows))
        rows = tuple(filter(None, rows))
        sums: dict[tuple[tuple[int, float], ...], int] = {}
        used: set[int] = set()
        for row in rows:
            row_places = [place for place, _ in row]
            sums[row] = sum(map(place_ranks.__getitem__, row_places))
            used.update(row_places)
        work = Workload(
            num_mixtures=len(rows),
            largest=max(sums.values(), default=0),
            total=sum(map(sums.__getitem__, rows)),
            num_segments=len(sums),
            distinct=sum(sums.values()),
            stacked=sum(map(place_ranks.__getitem__, used)),
        )
        return cls(places, touched, rows, work)

    def among_all(self, kernel: Kernel, num_mixtures: int, device: torch.device) -> Kernel:
        """Return the kernel of `rows` extended to all rows; a row without an expert is left out of the products."""
        if len(self.touched) == num_mixtures:
            return kernel
        return SomeRows(kernel, num_mixtures, place_of(self.touched, device))


@dataclass(eq=False)
class _LayerRows:
    """The mixture's rows in one layer: device, dtype, ranks, mixed gains and biases, and the kernels made so far."""

    device: torch.device
    dtype: torch.dtype
    ranked: RankedRows
    affine: Affine | None
    kernels: dict[tuple[str, torch.dtype], Kernel] = field(default_factory=dict)

    def workload(self, num_inputs: int, num_outputs: int, tokens: int) -> Workload:
        return replace(
            self.ranked.work,
            tokens=tokens,
            num_inputs=num_inputs,
            num_outputs=num_outputs,
            itemsize=self.dtype.itemsize,
            device=self.device.type,
            native=compiled_threads(self.device, self.dtype),
        )


@dataclass(frozen=True, eq=False)
class AffineTable:
    """The gains and biases of a layer's experts, in fp32 or better; zero for an expert without."""

    gain_EO: Tensor | None
    bias_EO: Tensor | None
    has_gain_E: Tensor

    @classmethod
    def of(cls, parts: Sequence[PlacedFactors | None]) -> AffineTable | None:
        """Return the table for a layer's experts, None where one does not update it; None if it would be empty."""
        if all(part is None or (part.gain_O is None and part.bias_O is None) for part in parts):
            return None
        gain_EO = _table([None if part is None else part.gain_O for part in parts])
        bias_EO = _table([None if part is None else part.bias_O for part in parts])
        has_gain = [part is not None and part.gain_O is not None for part in parts]
        device = next(part.a_RI.device for part in parts if part is not None)
        return cls(gain_EO, bias_EO, torch.tensor(has_gain, device=device))

    def weigh(self, w_BTE: Tensor, *, in_order: bool = False) -> Affine:
        """Return the gains and biases summed over experts by weight; B and T may be 1. `in_order` adds one at a time."""
        touched_BT1 = None
        if self.gain_EO is not None and not w_BTE.requires_grad:
            touched_BT1 = ((w_BTE != 0) & self.has_gain_E).any(dim=-1, keepdim=True)
        with own_precision(w_BTE.device):
            gain, bias = (
                None if values_EO is None else _weighted(w_BTE, values_EO, in_order)
                for values_EO in (self.gain_EO, self.bias_EO)
            )
            return Affine(gain, bias, touched_BT1)


@dataclass(frozen=True, eq=False)
class Affine:
    """The mixed gain and bias of each row (and token, if weights vary by token); touched_BT1 marks rows with a gain."""

    gain_BTO: Tensor | None
    bias_BTO: Tensor | None
    touched_BT1: Tensor | None

    def on(self, y_BTO: Tensor, base_bias_O: Tensor | None) -> Tensor:
        """Return gain * (y - base bias) + bias, to be added to the base layer's output y, in fp32 or better."""
        total = torch.zeros((), device=y_BTO.device)
        if self.gain_BTO is not None:
            y0_BTO = y_BTO.to(self.gain_BTO.dtype)
            y0_BTO = y0_BTO if base_bias_O is None else y0_BTO - base_bias_O.to(y0_BTO)
            total = repeat_rows(self.gain_BTO, y_BTO.shape[0]) * y0_BTO
            if self.touched_BT1 is not None:
                # a row without a gain is unchanged even if the base has overflowed
                total = torch.where(repeat_rows(self.touched_BT1, y_BTO.shape[0]), total, 0.0)
        if self.bias_BTO is not None:
            total = total + repeat_rows(self.bias_BTO, y_BTO.shape[0])
        return total


def _weighted(w_BTE: Tensor, table_EO: Tensor, in_order: bool) -> Tensor:
    w_BTE = w_BTE.to(table_EO.dtype)
    if not in_order:
        return w_BTE @ table_EO
    total = w_BTE.new_zeros(*w_BTE.shape[:2], table_EO.shape[1])
    for expert, row_O in enumerate(table_EO):
        total += w_BTE[:, :, expert, None] * row_O
    return total


def _table(rows: list[Tensor | None]) -> Tensor | None:
    present = next((row for row in rows if row is not None), None)
    if present is None:
        return None
    return torch.stack([torch.zeros_like(present) if row is None else row for row in rows])


_Kind = tuple[int, torch.dtype, torch.device]


class Workspace:
    """A store of flat tensors for reuse, up to `max_bytes` in all; the least recently used sizes and dtypes go first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = lock_of(self)
        self._free: OrderedDict[_Kind, list[Tensor]] = OrderedDict()
        self.num_bytes = 0

    def take(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor (`num_elements`,): a stored one if one is free, else a new one."""
        with self._lock:
            kept = self._free.get((num_elements, dtype, device))
            if kept:
                self._free.move_to_end((num_elements, dtype, device))
                tensor = kept.pop()
                self.num_bytes -= tensor.nbytes
                return tensor
        return torch.empty(num_elements, dtype=dtype, device=device)

    def give(self, tensors: Iterable[Tensor]) -> None:
        """Take tensors back; nothing may refer to them any more."""
        with self._lock:
            for tensor in tensors:
                self._free.setdefault((tensor.numel(), tensor.dtype, tensor.device), []).append(tensor)
                self.num_bytes += tensor.nbytes
            while self.num_bytes > self.max_bytes:
                kind, kept = next(iter(self._free.items()))
                if kept:
                    self.num_bytes -= kept.pop().nbytes
                else:
                    del self._free[kind]
