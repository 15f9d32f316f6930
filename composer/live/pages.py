"""The pages of experts, each an adapter's factors on the layers' devices, and the shelf that keeps the last used pages.

A page is a flat tensor for each device and dtype, and a view for each part (`Layout`).
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from loraweave.common.checks import is_whole
from loraweave.composer.model.layers import TargetLayer, is_floating
from loraweave.errors import BudgetExceeded, CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

Key = TypeVar("Key", bound=Hashable)
Thing = TypeVar("Thing")

# a device and the dtype of a layer there
Place = tuple[torch.device, torch.dtype]

# every part begins at a multiple of these
ALIGNMENT_BYTES = 64
EXACT = ("gain_O", "bias_O")
IN_PLACE: Place = (torch.device("cpu"), torch.float32)


@dataclass(frozen=True, eq=False)
class PlacedFactors:
    """One expert's factors in one layer, on a device in a dtype; gain and bias in fp32 or better.

    All are contiguous, but for b_RO in fp32 on the CPU, which is a view of the adapter's own b_OR.
    """

    a_RI: Tensor
    b_RO: Tensor
    gain_O: Tensor | None = None
    bias_O: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """One tensor of a layer; `offset` counts elements in a flat tensor, None if the adapter's own tensor serves."""

    name: str
    shape: tuple[int, ...]
    place: Place
    offset: int | None


class Layout:
    """The positions of all parts of an adapter in flat tensors; adapters of one form and the same ranks share a layout.

    `places` has the device and dtype of each layer that is known; parts in other layers are left out. `staged(device)` is
    True for a device that is filled from a copy in the CPU's memory. For layers in fp32 on a CPU that is not staged nothing
    is copied. `num_bytes` has the bytes of parts on staged devices (True) and on others (False), copied or not.
    """

    def __init__(self, adapter: Adapter, places: Mapping[str, Place], staged: Callable[[torch.device], bool]) -> None:
        self.num_bytes = {True: 0, False: 0}
        self._num_elements: dict[Place, int] = {}
        self._staged: dict[torch.device, bool] = {}
        self._layers: dict[str, tuple[Part, ...]] = {}
        self.layers = frozenset(adapter.layers)
        for layer, factors in adapter.layers.items():
            if layer not in places:
                continue
            device, dtype = places[layer]
            is_staged = self._staged[device] = staged(device)
            parts = []
            for name, tensor in _tensors(factors).items():
                place = (device, torch.promote_types(dtype, torch.float32) if name in EXACT else dtype)
                kept = place == IN_PLACE and not is_staged
                parts.append(Part(name, tuple(tensor.shape), place, None if kept else self._next(place, tensor)))
                self.num_bytes[is_staged] += tensor.numel() * place[1].itemsize
            self._layers[layer] = tuple(parts)

    @property
    def places(self) -> tuple[Place, ...]:
        """The (device, dtype) pairs that have a flat tensor."""
        return tuple(self._num_elements)

    def make_flats(self, adapter: Adapter, *, staged: bool, pinned: bool = False) -> dict[Place, Tensor]:
        """Return {place: flat CPU tensor of the adapter's numbers} for places on staged devices, or for the others."""
        sizes = self._num_elements.items()
        exact = {place: np.empty(size, np.float32) for place, size in sizes if self._staged[place[0]] is staged}
        for layer, parts in self._layers.items() if exact else ():
            tensors = _tensors(adapter.layers[layer])
            for part in parts:
                if part.offset is not None and part.place in exact:
                    # numpy turns a matrix round in a tenth of the time that torch takes
                    values = tensors[part.name].to("cpu", torch.float32).numpy()
                    np.copyto(exact[part.place][part.offset : part.offset + values.size].reshape(values.shape), values)
        flats = {}
        for place, flat in exact.items():
            filled = torch.from_numpy(flat)
            if pinned:
                flats[place] = torch.empty(flat.size, dtype=place[1], pin_memory=True).copy_(filled)
            else:
                flats[place] = filled.to(place[1])
        return flats

    def make_views(
        self, flats: Mapping[Place, Tensor], adapter: Adapter | None, *, staged: bool
    ) -> dict[str, PlacedFactors]:
        """Return layers' factors as views of the flat tensors; `adapter` has the tensors of parts that are not copied."""
        views = {}
        for layer, parts in self._layers.items():
            if self._staged[parts[0].place[0]] is not staged:
                continue
            adapter_tensors = {} if adapter is None else _tensors(adapter.layers[layer])
            tensors: dict[str, Tensor] = {}
            for part in parts:
                if part.offset is None:
                    kept_tensor = adapter_tensors[part.name].to(*IN_PLACE)
                    # one that was read below inference_mode could take no part in a later training step
                    tensors[part.name] = kept_tensor.clone() if kept_tensor.is_inference() else kept_tensor
                else:
                    tensors[part.name] = _view(flats[part.place], part.shape, part.offset)
            views[layer] = PlacedFactors(**tensors)
        return views

    def _next(self, place: Place, tensor: Tensor) -> int:
        offset = self._num_elements.get(place, 0)
        step = ALIGNMENT_BYTES // place[1].itemsize
        self._num_elements[place] = offset + math.ceil(tensor.numel() / step) * step
        return offset


def place_factors(factors: Factors, device: torch.device, dtype: torch.dtype) -> PlacedFactors:
    """Return one layer's factors on a device in a dtype, for a layer whose place was unknown or has changed."""
    exact = torch.promote_types(dtype, torch.float32)
    gain_O, bias_O = factors.gain_O, factors.bias_O
    return PlacedFactors(
        factors.a_RI.detach().to(device, dtype),
        factors.b_OR.detach().T.to(device, dtype),
        None if gain_O is None else gain_O.detach().to(device, exact),
        None if bias_O is None else bias_O.detach().to(device, exact),
    )


def _tensors(factors: Factors) -> dict[str, Tensor]:
    """Return the factors' tensors by the names of `PlacedFactors`."""
    tensors = {"a_RI": factors.a_RI, "b_RO": factors.b_OR.T}
    if factors.gain_O is not None:
        tensors["gain_O"] = factors.gain_O
    if factors.bias_O is not None:
        tensors["bias_O"] = factors.bias_O
    # factors take no part in training
    return {name: tensor.detach() if tensor.requires_grad else tensor for name, tensor in tensors.items()}


def _view(flat: Tensor, shape: tuple[int, ...], offset: int) -> Tensor:
    return flat.as_strided(shape, (shape[1], 1) if len(shape) == 2 else (1,), offset)


def find_places(model: nn.Module, layers: Mapping[str, TargetLayer]) -> dict[str, Place]:
    """Return {layer: (device, dtype)} for the layers where both are known before they run.

    A quantised layer calculates in the dtype of its input, which is assumed to be that of the model's first floating-point
    parameter; an offloaded layer runs where accelerate brings it.
    """
    places: dict[str, Place] = {}
    dtype: torch.dtype | None = None
    for name, layer in layers.items():
        weight = layer.parameter("weight")
        if weight is None:
            continue
        device = weight.device
        if device.type == "meta":
            moved = getattr(getattr(layer.module, "_hf_hook", None), "execution_device", None)
            if moved is None:
                continue
            device = torch.device(moved)
        if is_floating(weight.dtype):
            places[name] = device, weight.dtype
        else:
            dtype = dtype or next(
                (parameter.dtype for parameter in model.parameters() if is_floating(parameter.dtype)), torch.float32
            )
            places[name] = device, dtype
    return places


@dataclass(eq=False)
class Slot(Generic[Thing]):
    """An entry of a `Shelf`: `thing` is its cached object, or None until the first user makes it under `lock`."""

    num_bytes: int
    num_users: int = 0
    thing: Thing | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Shelf(Generic[Key, Thing]):
    """A least-recently-used cache {key: slot}, one object per slot, of at most `budget_bytes` in all (None: no limit).

    `option` is the budget's name for messages. Slots in use are never dropped. The caller holds one lock around every call.
    """

    def __init__(self, option: str, budget_bytes: int | None) -> None:
        if budget_bytes is not None and not is_whole(budget_bytes, 1):
            raise CompositionError(
                f"{option} is {budget_bytes!r}; it is a number of bytes, at least 1, or None for no limit"
            )
        self.option = option
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self.num_evictions = 0
        self._slots: dict[Key, Slot[Thing]] = {}
        # the slots without a user, least recently used first
        self._idle: OrderedDict[Key, Slot[Thing]] = OrderedDict()
        self._bytes_in_use = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def require_room(self, sizes: Mapping[Key, int], what: str) -> None:
        """Raise BudgetExceeded, naming `what`, if slots of these sizes in bytes do not fit beside all other slots in use."""
        if self.budget_bytes is None:
            return
        shared = [key for key in sizes if key in self._slots and key not in self._idle]
        others = self._bytes_in_use - sum(self._slots[key].num_bytes for key in shared)
        needed = sum(sizes.values())
        if others + needed > self.budget_bytes:
            beside = f" beside the {others:,} that open activations use" if others else ""
            raise BudgetExceeded(
                f"{what} need {needed:,} bytes{beside}, but {self.option} is {self.budget_bytes:,}; activate fewer experts "
                f"at once, close activations that are open, or make the Composer with a larger {self.option}"
            )

    def take(self, sizes: Mapping[Key, int], what: str) -> dict[Key, Slot[Thing]]:
        """Return {key: slot}, each slot in use until `give_back`; slots of new keys are empty (`thing` is None).

        `sizes` are in bytes. Idle slots make room, least recently used first. Raises BudgetExceeded, which says that `what`
        needs the bytes, if the slots do not fit beside those in use.
        """
        self.require_room(sizes, what)
        taken: dict[Key, Slot[Thing]] = {}
        needed = 0
        for key, size in sizes.items():
            if key in self._slots:
                taken[key] = self._use(self._slots[key])
                self._idle.pop(key, None)
            else:
                needed += size
        while self.budget_bytes is not None and self.num_bytes + needed > self.budget_bytes:
            self._remove(next(iter(self._idle)))
            self.num_evictions += 1
        for key, size in sizes.items():
            if key not in taken:
                taken[key] = self._slots[key] = self._use(Slot(size))
                self.num_bytes += size
        return taken

    def give_back(self, taken: Mapping[Key, Slot[Thing]]) -> None:
        """End one use of each slot; drop slots that were never filled."""
        for key, slot in taken.items():
            slot.num_users -= 1
            if slot.num_users == 0:
                self._bytes_in_use -= slot.num_bytes
                self._idle[key] = slot
                if slot.thing is None:
                    self._remove(key)

    def drop(self, unwanted: Callable[[Key], bool]) -> None:
        """Drop the idle slots whose keys `unwanted` accepts."""
        for key in [key for key in self._idle if unwanted(key)]:
            self._remove(key)

    def unlock(self) -> None:
        """Replace the locks of all slots, whose holders may no longer exist."""
        for slot in self._slots.values():
            slot.lock = threading.Lock()

    def _use(self, slot: Slot[Thing]) -> Slot[Thing]:
        if slot.num_users == 0:
            self._bytes_in_use += slot.num_bytes
        slot.num_users += 1
        return slot

    def _remove(self, key: Key) -> None:
        slot = self._slots.pop(key)
        del self._idle[key]
        slot.thing = None
        self.num_bytes -= slot.num_bytes
