"""Memory for gathered factors that is used again by the next mixture: fresh pages cost more than the copies into them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor

from loraweave.composer.lock_after_fork import lock_of

_Kind = tuple[int, torch.dtype, torch.device]


class Workspace:
    """Flat tensors that were given back, up to `max_bytes` in all; beyond that the kinds longest unused go first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = lock_of(self)
        self._free: OrderedDict[_Kind, list[Tensor]] = OrderedDict()
        self.num_bytes = 0

    def take(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat tensor of any content, which nothing else refers to."""
        with self._lock:
            kept = self._free.get((num_elements, dtype, device))
            if kept:
                self._free.move_to_end((num_elements, dtype, device))
                tensor = kept.pop()
                self.num_bytes -= tensor.nbytes
                return tensor
        return torch.empty(num_elements, dtype=dtype, device=device)

    def give(self, tensors: Iterable[Tensor]) -> None:
        """Takes tensors back, to which nothing may refer any more."""
        with self._lock:
            for tensor in tensors:
                self._free.setdefault((tensor.numel(), tensor.dtype, tensor.device), []).append(tensor)
                self.num_bytes += tensor.nbytes
            while self.num_bytes > self._max_bytes:
                kind, kept = next(iter(self._free.items()))
                if kept:
                    self.num_bytes -= kept.pop().nbytes
                else:
                    del self._free[kind]
