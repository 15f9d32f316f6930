"""Factors that stay at fixed addresses while mixtures change: a batch's new mixture only writes one small tensor.

    an arena    a_CI and b_CO of each layer: C rank rows, of which an expert has the same ones in all layers
                |  e0 e0  |  e1 e1 e1 e1  |  ..  |  e2  |       as many as its largest rank; a layer reads its own rank
    a board     count_M, index_MR, w_MR    of M rows: how many rank rows, which, and how much each counts,
                                           once for each group of layers in which the experts have the same ranks

Boards keep their addresses, and so do arenas until they grow, so that what is made for a layer and a board (kernels, a
recorded graph) serves every later mixture of as many rows. The idea is that of vLLM's slots. A board is one activation's
until that ends. The naive twin is the path without an arena, which gathers factors for each mixture (`row_weights.py`);
`tests/extensions/accelerators/arena_cases.py` compares both with the formula.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraweave import Adapter, MixtureWeights
from loraweave.extend import TargetLayer
from loraweave.extend.live import Kernel, Lease, LiveHook, PlacedFactors, lock_of
from loraweave.extensions.accelerators.kernels.triton_gathered import TritonGathered
from loraweave.extensions.accelerators.kernels.triton_segments import TritonSegments
from loraweave.extensions.accelerators.rank_tables import DEVICES, RankTables, triton_runs

# the width of a board is a multiple of this, so that mixtures with nearly as many rank rows share a board
COLUMNS = 8
# the least factor by which an arena grows, since each growth copies it
GROWTH = 1.25
MOST_FREE_BOARDS = 16


class _Table(NamedTuple):
    """One layer's rank rows of all experts in the arena."""

    a_CI: Tensor
    b_CO: Tensor


@dataclass(eq=False)
class _Slot:
    """An expert's rank rows in the arena: `size` rows from `start` on. `profile` is the number of its rank profile."""

    start: int
    size: int
    profile: int
    num_users: int = 0


@dataclass(frozen=True)
class _Groups:
    """Layers in G groups: in all layers of group g, an expert of rank profile p (ranks by layer) has ranks_GP[g, p]."""

    of_layer: Mapping[str, int]
    ranks_GP: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Board:
    """A mixture for M batch rows: the numbers and weights of the rank rows that each batch row uses per group of layers.

    They lie at fixed addresses, an int32 tensor for each device, so that a captured graph can read the next mixture.
    `remembered` and `kernels` keep what was made for these addresses; a board that is lent again keeps them.
    """

    key: tuple[Any, ...]
    groups: _Groups
    flat_by_device: Mapping[torch.device, Tensor]
    slots: tuple[_Slot, ...]
    remembered: dict[str, Any] = field(default_factory=dict)
    kernels: dict[tuple[str, bool], Kernel] = field(default_factory=dict)

    def reaches(self, layer: str) -> bool:
        """Return True if any expert of the mixture has rank rows in `layer`."""
        return layer in self.groups.of_layer


class Arena(LiveHook):
    """The lender of boards, which keeps the experts' rank rows at fixed addresses. Any thread may call.

    Above `max_bytes`, it drops experts that no board uses, the least recently used first; those in use have no limit.
    """

    devices = DEVICES

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._lock = lock_of(self)
        self._clear()

    def _clear(self) -> None:
        self._moves = -1
        # the first row is zeros, to which the columns of a board point that are not used
        self._capacity = 1
        self._tables: dict[str, _Table] = {}
        # slots by expert, the one used longest ago first
        self._slots: OrderedDict[str, _Slot] = OrderedDict()
        self._profiles: dict[tuple[tuple[str, int], ...], int] = {}
        self._groups: dict[tuple[int, ...], _Groups] = {}
        self._free: OrderedDict[tuple[Any, ...], list[Board]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """The bytes of all layers' rank rows, including rows that no expert occupies."""
        return self._capacity * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return sum(sum(rows.shape[1] * rows.itemsize for rows in (t.a_CI, t.b_CO)) for t in self._tables.values())

    @classmethod
    def bytes_beside(cls, adapter: Adapter, device: torch.device, dtype: torch.dtype) -> int:
        """Return the bytes that an adapter takes in an arena that has the adapter's layers; 0 where Triton does not run."""
        if not triton_runs(device.type, dtype.itemsize):
            return 0
        widths = sum(factors.a_RI.shape[1] + factors.b_OR.shape[0] for factors in adapter.layers.values())
        return dtype.itemsize * widths * max((factors.rank for factors in adapter.layers.values()), default=0)

    def prepare(self, mixture: MixtureWeights, lease: Lease, layers: Mapping[str, TargetLayer]) -> Board | None:
        """Lend a board with this mixture, whose M rows have the same weights in all `layers`, until `release`.

        `lease` holds the mixture's experts on their devices. Returns None where an expert has more than factors, where its
        factors are not placed or Triton does not run there, and while boards from before a move of the model are in use.
        """
        # asked before each call of a model: without Triton, not even one expert has to be looked at
        if not triton_runs("cuda", 4):
            return None
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if lease.moves != self._moves:
                if any(slot.num_users for slot in self._slots.values()):
                    return None
                self._clear()
                self._moves = lease.moves
            slots = self._enter(mixture.experts, lease, layers)
            if slots is None or not any(slot.size for slot in slots):
                return None
            board = self._board(mixture.values_BTLE[:, 0, 0].cpu().numpy(), slots)
            for slot in slots:
                slot.num_users += 1
            return board

    def release(self, prepared: Board) -> None:
        """Take back a board that `prepare` lent; experts that no other board uses may then be dropped."""
        with self._lock:
            for slot in prepared.slots:
                slot.num_users -= 1
            # a board of an arena that has grown since is not used again
            if prepared.key[0] == (self._moves, self._capacity):
                self._free.setdefault(prepared.key, []).append(prepared)
                self._free.move_to_end(prepared.key)
                if sum(map(len, self._free.values())) > MOST_FREE_BOARDS:
                    key, boards = next(iter(self._free.items()))
                    boards.pop()
                    if not boards:
                        del self._free[key]

    def forget(self, expert: str) -> None:
        """Drop the expert of this name, which may then be given to another expert.

        Frees the whole arena if no board is in use and less than half of its rank rows are occupied.
        """
        with self._lock:
            self._slots.pop(expert, None)
            num_rows = sum(slot.size for slot in self._slots.values())
            if not any(slot.num_users for slot in self._slots.values()) and 2 * num_rows < self._capacity:
                self._clear()

    def kernel(
        self, prepared: Board, layer: TargetLayer, device: torch.device, dtype: torch.dtype, *, one: bool
    ) -> Kernel | None:
        """Return the kernel that adds the board's mixture to a layer, for `one` token a row or for more.

        Returns None unless the arena has the layer's factors on this device in this dtype.
        """
        if (kernel := prepared.kernels.get((layer.name, one))) is None:
            table = self._tables[layer.name]
            group = prepared.groups.of_layer[layer.name]
            num_rows, width = prepared.key[1], prepared.key[2]
            flat = prepared.flat_by_device[table.a_CI.device][group]
            index_MR, w_MR = flat[num_rows:].view(2, num_rows, width)
            tables = RankTables(table.a_CI, table.b_CO, index_MR, w_MR.view(torch.float32), flat[:num_rows])
            kernel = prepared.kernels[layer.name, one] = _kernel(tables, one=one)
        table = self._tables[layer.name]
        return kernel if table.a_CI.device == device and table.a_CI.dtype == dtype else None

    def _enter(self, names: Sequence[str], lease: Lease, layers: Mapping[str, TargetLayer]) -> tuple[_Slot, ...] | None:
        slots = []
        for name in names:
            if (slot := self._slots.get(name)) is None:
                parts = _parts(name, lease, layers)
                if parts is None:
                    return None
                slot = self._slots[name] = self._filled(parts, names)
            self._slots.move_to_end(name)
            slots.append(slot)
        return tuple(slots)

    def _filled(self, parts: Mapping[str, PlacedFactors], staying: Sequence[str]) -> _Slot:
        for layer, part in parts.items():
            if layer not in self._tables:
                widths = part.a_RI.shape[1], part.b_RO.shape[1]
                self._tables[layer] = _Table(*(part.a_RI.new_zeros(self._capacity, width) for width in widths))
        ranks = tuple((layer, part.a_RI.shape[0]) for layer, part in parts.items())
        size = max((rank for _, rank in ranks), default=0)
        slot = _Slot(self._room(size, staying), size, self._profiles.setdefault(ranks, len(self._profiles)))
        for layer, part in parts.items():
            rank_rows = slice(slot.start, slot.start + part.a_RI.shape[0])
            self._tables[layer].a_CI[rank_rows] = part.a_RI
            self._tables[layer].b_CO[rank_rows] = part.b_RO
        return slot

    def _room(self, size: int, staying: Sequence[str]) -> int:
        """Return the first of `size` free rank rows, made by dropping experts other than `staying` or by growing."""
        while (start := self._gap(size)) + size > self._capacity:
            idle = next((name for name, slot in self._slots.items() if not slot.num_users and name not in staying), None)
            if idle is None or (start + size) * self._row_bytes <= self.max_bytes:
                self._grow(max(start + size, min(int(self._capacity * GROWTH), self.max_bytes // max(self._row_bytes, 1))))
            else:
                del self._slots[idle]
        return start

    def _gap(self, size: int) -> int:
        """Return the index of the first of `size` consecutive free rank rows, which may end beyond the arena's capacity."""
        start = 1
        for slot in sorted(self._slots.values(), key=lambda slot: slot.start):
            if slot.start - start >= size:
                break
            start = slot.start + slot.size
        return start

    def _grow(self, capacity: int) -> None:
        # free boards have kernels that read the old tensors
        self._free.clear()
        for layer, table in self._tables.items():
            # one layer after the other, so that only one exists twice at a time
            a_CI, b_CO = (rows.new_zeros(capacity, rows.shape[1]) for rows in (table.a_CI, table.b_CO))
            a_CI[: self._capacity], b_CO[: self._capacity] = table.a_CI, table.b_CO
            self._tables[layer] = _Table(a_CI, b_CO)
        self._capacity = capacity

    def _board(self, w_ME: NDArray[np.float32], slots: tuple[_Slot, ...]) -> Board:
        profile_of = [slot.profile for slot in slots]
        profiles = tuple(sorted(set(profile_of)))
        groups = self._groups.get(profiles) or self._groups.setdefault(profiles, self._group(profiles))
        start_E = np.array([slot.start for slot in slots])
        rank_GE = groups.ranks_GP[:, [profiles.index(profile) for profile in profile_of]]
        used_ME = w_ME != 0
        expert_N = used_ME.nonzero()[1]
        count_GM = (used_ME @ rank_GE.T).T
        width = max(COLUMNS, -(-int(count_GM.max(initial=0)) // COLUMNS) * COLUMNS)
        written = _spread(rank_GE[:, expert_N], start_E[expert_N], w_ME[used_ME], count_GM, width)
        key = (self._moves, self._capacity), len(w_ME), width, profiles
        if free := self._free.get(key):
            board = replace(free.pop(), slots=slots)
        else:
            devices = {table.a_CI.device for table in self._tables.values()}
            flats = {device: torch.empty(written.shape, dtype=torch.int32, device=device) for device in devices}
            board = Board(key, groups, flats, slots)
        for flat in board.flat_by_device.values():
            # from pageable memory, so that it has been read when this returns
            flat.copy_(torch.from_numpy(written))
        return board

    def _group(self, profiles: tuple[int, ...]) -> _Groups:
        known = {number: dict(ranks) for ranks, number in self._profiles.items()}
        ranks_of = {layer: tuple(known[number].get(layer, 0) for number in profiles) for layer in self._tables}
        distinct = sorted({ranks for ranks in ranks_of.values() if any(ranks)})
        of_layer = {layer: distinct.index(ranks) for layer, ranks in ranks_of.items() if any(ranks)}
        return _Groups(of_layer, np.array(distinct, dtype=np.int64).reshape(len(distinct), len(profiles)))


def _parts(name: str, lease: Lease, layers: Mapping[str, TargetLayer]) -> Mapping[str, PlacedFactors] | None:
    """Return {linear layer: the expert's factors}, or None if an arena cannot hold all of its update (a gain, a bias)."""
    placed = lease.placed(name)
    if not lease.layers_of(name) <= layers.keys():
        return None
    wanted = {
        layer for layer in lease.layers_of(name) if layers[layer].kind.name == "linear" and layers[layer].number is None
    }
    if not wanted <= placed.keys():
        return None
    parts = {layer: part for layer, part in placed.items() if layer in wanted}
    fits = all(part.gain_O is None and part.bias_O is None for part in parts.values())
    return parts if fits and all(triton_runs(part.a_RI.device.type, part.a_RI.itemsize) for part in parts.values()) else None


def _spread(
    rank_GN: NDArray[np.int64],
    start_N: NDArray[np.int64],
    w_N: NDArray[np.float32],
    count_GM: NDArray[np.int64],
    width: int,
) -> NDArray[np.int32]:
    """Return the contents of a board, (G, M + 2 M `width`): count_M, index_MR and w_MR for each of G groups of layers.

    R is `width`, and w_MR is stored as the bits of fp32. The inputs are of N (batch row, expert) pairs in the rows' order:
    each expert's rank by group (rank_GN), its first rank row in the arena (start_N) and its weight (w_N).
    """
    num_groups, num_rows = count_GM.shape
    flats = np.zeros((num_groups, num_rows * (1 + 2 * width)), np.int32)
    flats[:, :num_rows] = count_GM
    for written, rank_N, count_M in zip(flats, rank_GN, count_GM, strict=True):
        index_MR, w_MR = written[num_rows:].reshape(2, num_rows, width)
        # the columns of each row that are filled, from its left; row by row this is the order of the uses
        filled_MR = np.arange(width) < count_M[:, None]
        shift_S = (start_N + rank_N - rank_N.cumsum()).repeat(rank_N)
        index_MR[filled_MR] = shift_S + np.arange(len(shift_S))
        w_MR.view(np.float32)[filled_MR] = w_N.repeat(rank_N)
    return flats


def _kernel(tables: RankTables, *, one: bool) -> Kernel:
    if one:
        return TritonGathered(tables)
    num_rows = len(tables.count_G)
    # each row is a segment of its own, whichever rows have the same mixture
    first_G = torch.arange(num_rows + 1, dtype=torch.int32, device=tables.a_DI.device)
    return TritonSegments(tables, num_rows, 1, first_G[:-1], first_G)
