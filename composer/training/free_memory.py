"""How much memory there is, and how much is taken."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from loraweave.hub.host_memory import free_host_bytes

STATUS = Path("/proc/self/status")


def free_bytes(device: torch.device) -> int | None:
    """What a process may still take on a device, with what torch holds unused on it; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_host_bytes() if device.type == "cpu" else None


class MemoryUse:
    """How much more than now is in use later, at most: on a CUDA device what torch allocates, else of the whole process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._peak = self._highest()
        self._begun = torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident_bytes()

    def grown(self) -> int | None:
        """Bytes; None where more had been in use before, or the system does not say."""
        highest = self._highest()
        return None if highest is None or self._begun is None or highest == self._peak else highest - self._begun

    def _highest(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if sys.platform != "linux":
            return None
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident_bytes() -> int | None:
    if not STATUS.is_file():
        return None
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(fields["VmRSS"].split()[0])
